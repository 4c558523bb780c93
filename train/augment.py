"""Augmentation as tensor code: a whole batch at once, on the device, with its own random parameters for every image.

Where processes share a batch, each draws the parameters of all its images and keeps those of its own: they are the ones that one process
would draw, at the price of a few random numbers for each image of the others.

Each operation has a strength at which it does nothing, so "this image, not that one" is a strength per image and never a branch.
Images are float [N, C, H, W] in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


class Draws(NamedTuple):
    """Random numbers for each image of a batch of ``images``, of which this process has those numbered ``own``; None: all."""

    images: int
    device: torch.device
    own: Tensor | None = None

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1): [N, *shape]."""
        return self._own(torch.rand(self.images, *shape, device=self.device))

    def number(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """One for each image, [N, 1, 1, 1]."""
        return self.uniform(1, 1, 1) * (high - low) + low

    def integers(self, below: int) -> Tensor:
        """[N]"""
        return self._own(torch.randint(below, (self.images,), device=self.device))

    def _own(self, drawn: Tensor) -> Tensor:
        return drawn if self.own is None else drawn[self.own]


@dataclass(frozen=True)
class Augmentation:
    crop_padding: int = 0  # pixels of zeros around the image, then a random crop of the old size
    flip: bool = False
    rotate: float = 0.0  # degrees, either way
    shift: float = 0.0  # of the image's side, either way
    zoom: float = 0.0  # scale in 1 -+ zoom
    grayscale: float = 0.0  # probability; colour images only, as are jitter's saturation and hue
    color_jitter: float = 0.0  # s: brightness, contrast and saturation in 1 -+ 0.8 s, hue -+ 0.2 s of a turn (SimCLR)
    randaugment: int = 0  # operations per image, of strength 9 of 30
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def check(self) -> None:
        for name in ("crop_padding", "rotate", "shift", "color_jitter", "randaugment"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.zoom < 1:
            raise ValueError(f"zoom must lie in [0, 1), got {self.zoom}")
        if not 0 <= self.grayscale <= 1:
            raise ValueError(f"grayscale must lie in [0, 1], got {self.grayscale}")

    def train(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """uint8 -> augmented and normalised float. ``draws`` are of the batch that the images are part of; None: they are all of it."""
        draws = draws or Draws(len(images), images.device)
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, draws)
        x = images.float() / 255
        if self.flip:
            x = torch.where(draws.number() < 0.5, x.flip(3), x)
        if self.rotate or self.shift or self.zoom:
            x = random_affine(x, math.radians(self.rotate), self.shift, self.zoom, draws)
        if self.randaugment:
            x = randaugment(x, self.randaugment, draws)
        if self.color_jitter:
            x = color_jitter(x, self.color_jitter, draws)
        if self.grayscale and x.shape[1] == 3:
            x = torch.where(draws.number() < self.grayscale, luma(x), x)
        return self._normalize(x)

    def evaluate(self, images: Tensor) -> Tensor:
        return self._normalize(images.float() / 255)

    def _normalize(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


def luma(x: Tensor) -> Tensor:
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True) if x.shape[1] == 3 else x


def random_crop(images: Tensor, padding: int, draws: Draws) -> Tensor:
    n, _, h, w = images.shape
    rows, columns = (draws.integers(2 * padding + 1)[:, None] + torch.arange(s, device=images.device) for s in (h, w))
    padded = F.pad(images, (padding,) * 4)
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def warp(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Pixel p of the result is read at matrix p + shift; coordinates run from -1 to 1, what lies outside is 0. [N, 2, 2], [N, 2]"""
    grid = F.affine_grid(torch.cat([matrix, shift[:, :, None]], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def random_affine(x: Tensor, radians: float, shift: float, zoom: float, draws: Draws) -> Tensor:
    angle, scale = draws.number(-radians, radians).view(-1), 1 / draws.number(1 - zoom, 1 + zoom).view(-1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    offset = (draws.uniform(2) * 2 - 1) * 2 * shift
    return warp(x, torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2), offset)


def mix_channels(x: Tensor, saturation: Tensor, turn: Tensor) -> Tensor:
    """Saturation and hue as one 3 x 3 matrix per image: stretch (1 leaves alone) and rotation (0) of the colours about the grey axis.

    The rotation keeps r + g + b, a linear stand-in for the hue of HSV.
    """
    if x.shape[1] != 3:
        return x
    angle, s = (2 * math.pi * turn).view(-1, 1, 1), saturation.view(-1, 1, 1)
    third = x.new_full((3, 3), 1 / 3)
    cross = x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    rotation = third + angle.cos() * (torch.eye(3, device=x.device) - third) + angle.sin() * cross
    grey = x.new_tensor(LUMA).expand(3, 3)
    return torch.einsum("nij,njhw->nihw", (s * torch.eye(3, device=x.device) + (1 - s) * grey) @ rotation, x)


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (other + factor * (x - other)).clamp(0, 1)


def color_jitter(x: Tensor, s: float, draws: Draws) -> Tensor:
    """Brightness, contrast, saturation, hue: always in this order."""
    reach = 0.8 * s
    x = (x * draws.number(1 - reach, 1 + reach)).clamp(0, 1)
    x = blend(x, luma(x).mean((2, 3), keepdim=True), draws.number(1 - reach, 1 + reach))
    return mix_channels(x, draws.number(1 - reach, 1 + reach), draws.number(-0.2 * s, 0.2 * s)).clamp(0, 1)


OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast"),
)


def randaugment(x: Tensor, operations: int, draws: Draws, strength: float = 0.3) -> Tensor:
    """RandAugment (Cubuk et al. 2020): ``operations`` times one of OPERATIONS drawn per image. Its equalize is left out."""
    for _ in range(operations):
        choice = draws.integers(len(OPERATIONS))
        sign = draws.integers(2) * 2.0 - 1
        x = apply_operation(x, choice, sign * strength)
    return x


def apply_operation(x: Tensor, choice: Tensor, strength: Tensor) -> Tensor:
    """OPERATIONS[choice] with a signed strength in [-1, 1], both [N]; every operation runs on every image, at rest where not chosen."""

    def of(name: str) -> Tensor:  # the strength of an operation: 0 where another was drawn
        return torch.where(choice == OPERATIONS.index(name), strength, torch.zeros_like(strength))

    def image(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    angle = of("rotate") * math.radians(30)
    matrix = torch.stack([angle.cos(), 0.3 * of("shear_x") - angle.sin(), 0.3 * of("shear_y") + angle.sin(), angle.cos()], 1)
    warped = warp(x, matrix.view(-1, 2, 2), torch.stack([of("translate_x"), of("translate_y")], 1) * 0.9)
    geometric = (choice >= OPERATIONS.index("shear_x")) & (choice <= OPERATIONS.index("rotate"))
    x = torch.where(image(geometric), warped, x)  # resampling blurs even where nothing moves
    x = (x * image(1 + 0.9 * of("brightness"))).clamp(0, 1)
    x = mix_channels(x, image(1 + 0.9 * of("color")), image(torch.zeros_like(strength))).clamp(0, 1)
    x = blend(x, luma(x).mean((2, 3), keepdim=True), image(1 + 0.9 * of("contrast")))
    x = blend(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), image(1 + 0.9 * of("sharpness")))
    levels = image(2 ** (8 - (4 * of("posterize").abs()).round())) - 1
    x = torch.where(image(choice == OPERATIONS.index("posterize")), (x * levels).round() / levels, x)
    x = torch.where(x > image(1 - of("solarize").abs()), 1 - x, x)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = torch.where(high > low, (x - low) / (high - low).clamp_min(1e-6), x)
    return torch.where(image(choice == OPERATIONS.index("autocontrast")), stretched, x)


AUGMENTATIONS = {
    "digits": Augmentation(rotate=15.0, shift=0.1, zoom=0.1),
    "cifar": Augmentation(crop_padding=4, flip=True, grayscale=0.2),
    "cifar-plain": Augmentation(crop_padding=4, flip=True),
    "autoaugment": Augmentation(crop_padding=4, flip=True),
    "sim": Augmentation(crop_padding=4, flip=True, grayscale=0.2, color_jitter=0.5),
    "files": Augmentation(flip=True, grayscale=0.2),
}


def mixup(images, alpha):
    raise NotImplementedError
