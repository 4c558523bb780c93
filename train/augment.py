"""Augmentation as tensor code: a whole batch at once, on the device, with its own random parameters for every image.

Where processes share a batch, each draws the parameters of all its images and keeps those of its own: they are the ones that one process
would draw, at the price of a few random numbers for each image of the others.

Each operation has a strength at which it does nothing, so "this image, not that one" is a strength per image and never a branch: no step
waits for a GPU, and every tensor there has the same shape at every step.

The operations of AutoAugment and RandAugment give Pillow's levels, uint8 [N, C, H, W]; all else is float [N, C, H, W] in [0, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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

    def signs(self) -> Tensor:
        """-1 or 1: [N]."""
        return self.integers(2) * 2.0 - 1

    def _own(self, drawn: Tensor) -> Tensor:
        return drawn if self.own is None else drawn[self.own]


@dataclass(frozen=True)
class Augmentation:
    """What happens to the images of one branch, in the order of the fields; an option at its default does nothing."""

    crop_padding: int = 0  # pixels of zeros around the image, then a random crop of the old size
    crop_scale: tuple[float, float] = (1.0, 1.0)  # of the area, smallest and largest crop, of sides 3:4 ... 4:3, resized to the old size
    flip: bool = False  # left to right, half of the images
    rotate: float = 0.0  # degrees, either way
    shift: float = 0.0  # of the image's side, either way
    zoom: float = 0.0  # scale in 1 -+ zoom
    autoaugment: Literal["none", "cifar10", "imagenet"] = "none"  # the policy found on these images
    randaugment: int = 0  # operations per image, of magnitude 9 of 30
    color_jitter: float = 0.0  # s: brightness, contrast and saturation in 1 -+ 0.8 s, hue -+ 0.2 s of a turn (SimCLR)
    color_jitter_probability: float = 1.0
    grayscale: float = 0.0  # probability; colour images only, as are jitter's saturation and hue
    blur: float = 0.0  # probability of a Gaussian blur of sigma 0.1 ... 2 pixels
    cutout: int = 0  # side in pixels of one black square, whose middle is anywhere in the image
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        for name in ("crop_padding", "rotate", "shift", "randaugment", "color_jitter", "cutout"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("color_jitter_probability", "grayscale", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.zoom < 1:
            raise ValueError(f"zoom must be in [0, 1), got {self.zoom}")
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise ValueError(f"crop_scale must be (smallest, largest) in (0, 1], got {self.crop_scale}")
        if len(self.mean) != len(self.std) or not all(std > 0 for std in self.std):
            raise ValueError(f"std must be as many positive numbers as mean, got mean {self.mean} and std {self.std}")
        if self.autoaugment != "none" and self.autoaugment not in POLICIES:
            raise ValueError(f"autoaugment must be one of none, {', '.join(POLICIES)}, got {self.autoaugment!r}")

    def train(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """uint8 -> augmented and normalised float. ``draws`` are of the batch that the images are part of; None: they are all of it."""
        draws = draws or Draws(len(images), images.device)
        if self.crop_padding or self.flip:
            images = crop_and_flip(images, self.crop_padding, self.flip, draws)
        x = images.float() / 255
        if tuple(self.crop_scale) != (1, 1):
            x = random_resized_crop(x, self.crop_scale, draws)
        if self.rotate or self.shift or self.zoom:
            x = random_affine(x, math.radians(self.rotate), self.shift, self.zoom, draws)
        if self.autoaugment != "none" or self.randaugment:
            levels = (x * 255).round().to(torch.uint8)
            if self.autoaugment != "none":
                levels = autoaugment(levels, POLICIES[self.autoaugment], draws)
            x = randaugment(levels, self.randaugment, draws).float() / 255
        if self.color_jitter:
            x = color_jitter(x, self.color_jitter, draws, self.color_jitter_probability)
        if self.grayscale and x.shape[1] == 3:
            x = torch.where(draws.number() < self.grayscale, luma(x), x)
        if self.blur:
            x = blur(x, draws.number(0.1, 2.0), draws.number() < self.blur)
        if self.cutout:
            x = cutout(x, self.cutout, draws)
        return self._normalize(x)

    def evaluate(self, images: Tensor) -> Tensor:
        return self._normalize(images.float() / 255)

    def _normalize(self, x: Tensor) -> Tensor:
        mean, std = (constant(tuple(v), x.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


@functools.cache
def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Brought to the device once: to copy it at every step would be to wait for the device, which a CUDA graph does not allow."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)


def per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


# ---- where a pixel comes from


def pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixel (i, j) of image n is read at rows[n, i, j], columns[n, i, j], of whole numbers; both spread to [N, H', W']."""
    n, c, _, w = images.shape
    index = (rows * w + columns).long()
    return images.flatten(2).gather(2, index.flatten(1)[:, None].expand(n, c, -1)).view(n, c, *index.shape[1:])


def crop_and_flip(images: Tensor, padding: int, flip: bool, draws: Draws) -> Tensor:
    """One read for both: 5 times as fast on a CPU as indexing the pixels of a channels-last copy, and a flip by torch.where after it."""
    h, w = images.shape[2:]
    rows, columns = (torch.arange(s, device=images.device)[None] for s in (h, w))
    if padding:
        rows, columns = (at + draws.integers(2 * padding + 1)[:, None] for at in (rows, columns))
        images = F.pad(images, (padding,) * 4)
    if flip:
        columns = torch.where(draws.integers(2)[:, None] == 0, columns, columns.flip(1))
    return pick(images, rows[:, :, None], columns[:, None])


def random_resized_crop(x: Tensor, scale: tuple[float, float], draws: Draws, attempts: int = 10) -> Tensor:
    """A part of ``scale`` of the area and with sides in 3:4 ... 4:3, as torchvision draws it: of ``attempts`` the first that fits, or all.

    Bilinear, clamped to the part: two matrix products, since the crop is separable; nothing is ever made smaller.
    """
    sides = torch.stack([scale[0] + (scale[1] - scale[0]) * draws.uniform(attempts), 2 * draws.uniform(attempts) - 1])
    area, ratio = sides[0] * (x.shape[2] * x.shape[3]), (4 / 3) ** sides[1]
    heights, widths = (area / ratio).sqrt().round().clamp_min(1), (area * ratio).sqrt().round().clamp_min(1)
    fits = (heights <= x.shape[2]) & (widths <= x.shape[3])
    first = fits.int().argmax(1, keepdim=True)

    def weights(lengths: Tensor, side: int) -> Tensor:
        length = torch.where(fits.any(1, keepdim=True), lengths.gather(1, first), side)  # [N, 1]
        start = (draws.uniform(1) * (side - length + 1)).floor().minimum(side - length)  # rounding can reach the upper end
        at = torch.arange(side, device=x.device)
        inside = torch.minimum(((at + 0.5) * length / side - 0.5).clamp_min(0), length - 1)
        return (1 - ((start + inside)[:, :, None] - at).abs()).clamp_min(0)[:, None]  # [N, 1, to, from]

    rows, columns = weights(heights, x.shape[2]), weights(widths, x.shape[3])
    return rows @ x @ columns.transpose(2, 3)


def warp(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Pixel p of the result is read at matrix p + shift; coordinates run from -1 to 1, what lies outside is 0. [N, 2, 2], [N, 2]"""
    grid = F.affine_grid(torch.cat([matrix, shift[:, :, None]], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def random_affine(x: Tensor, radians: float, shift: float, zoom: float, draws: Draws) -> Tensor:
    angle, scale = draws.number(-radians, radians).view(-1), 1 / draws.number(1 - zoom, 1 + zoom).view(-1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    offset = (draws.uniform(2) * 2 - 1) * 2 * shift
    return warp(x, torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2), offset)


# ---- colour


def luma(x: Tensor) -> Tensor:
    r, g, b = LUMA
    return r * x[:, :1] + g * x[:, 1:2] + b * x[:, 2:] if x.shape[1] == 3 else x


def mix_channels(x: Tensor, saturation: Tensor, turn: Tensor) -> Tensor:
    """Saturation and hue as one 3 x 3 matrix per image: stretch (1 leaves alone) and rotation (0) of the colours about the grey axis.

    The rotation keeps r + g + b, a linear stand-in for the hue of HSV.
    """
    if x.shape[1] != 3:
        return x
    angle, s = (2 * math.pi * turn).view(-1, 1, 1), saturation.view(-1, 1, 1)
    third, eye = x.new_full((3, 3), 1 / 3), torch.eye(3, device=x.device)
    cross = constant(((0.0, -1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 1.0, 0.0)), x.device) / math.sqrt(3)
    rotation = third + angle.cos() * (eye - third) + angle.sin() * cross
    grey = constant(LUMA, x.device).expand(3, 3)
    return torch.einsum("nij,njhw->nihw", (s * eye + (1 - s) * grey) @ rotation, x)


def blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return other + factor * (x - other)


def color_jitter(x: Tensor, s: float, draws: Draws, probability: float = 1.0) -> Tensor:
    """Brightness, contrast, saturation, hue, always in this order; torchvision's, which PaCo uses, is drawn, and its hue is HSV's."""
    chosen = (draws.number() < probability) * s if probability < 1 else s
    brightness, contrast, saturation = (1 + 0.8 * chosen * draws.number(-1, 1) for _ in range(3))
    x = (x * brightness).clamp(0, 1)
    x = blend(x, luma(x).mean((2, 3), keepdim=True), contrast).clamp(0, 1)
    return mix_channels(x, saturation, 0.2 * chosen * draws.number(-1, 1)).clamp(0, 1)


def blur(x: Tensor, sigma: Tensor, chosen: Tensor) -> Tensor:
    """Gaussian, where chosen: two matrix products, whose rows sum to 1 at the border too. ``sigma`` in pixels, both [N, 1, 1, 1]."""

    def weights(side: int) -> Tensor:
        at = torch.arange(side, device=x.device)
        distance = (at[:, None] - at) / sigma
        kernel = (-0.5 * distance.square()).exp()
        return kernel / kernel.sum(3, keepdim=True)

    return torch.where(chosen, weights(x.shape[2]) @ x @ weights(x.shape[3]).transpose(2, 3), x)


def cutout(x: Tensor, side: int, draws: Draws) -> Tensor:
    """DeVries & Taylor 2017: a square around a pixel drawn from the image, so that its border may cut it.

    It is black, as in the code of PaCo and its followers, which cut before they normalise. DeVries & Taylor cut after: the mean colour.
    """

    def covered(length: int) -> Tensor:
        middle, at = draws.integers(length)[:, None], torch.arange(length, device=x.device)
        return (at >= middle - side // 2) & (at < middle + side // 2)

    rows, columns = covered(x.shape[2]), covered(x.shape[3])
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)


def mixup(images: Tensor, alpha: float, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Zhang et al. 2018: lambda x + (1 - lambda) x[partner], with one lambda ~ Beta(alpha, alpha) for the whole batch.

    Returns the mixed images, partner [N], a permutation, and lambda [], with which
    ``lambda * loss(logits, labels) + (1 - lambda) * loss(logits, labels[partner])`` is the loss; nothing waits for the device.

    ``draws`` are of the batch that the images are part of. Processes that share a batch, and draw from the same generator, have the same
    lambda. The partner is one of the process's own images, so that it need not be sent: who is mixed with whom depends on their number.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if len(images) != (draws.images if draws.own is None else len(draws.own)):
        raise ValueError(f"draws must be for as many images as images has, {len(images)}, got {draws}")
    partner = draws.uniform().argsort()
    pair = torch._standard_gamma(torch.full((2,), float(alpha), device=images.device))  # torch's Beta cannot be compiled
    share = pair[0] / pair.sum()
    return share * images + (1 - share) * images[partner], partner, share


# ---- AutoAugment and RandAugment

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize", "invert"),
)
FILL = 128  # what comes into the image from outside

# Cubuk et al. 2019, tables 7 and 9: sub-policies of two operations, each with its probability and its magnitude, 0 ... 9.
Policy = tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...]
POLICIES: Mapping[str, Policy] = {
    "cifar10": (
        (("invert", 0.1, 7), ("contrast", 0.2, 6)),
        (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
        (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
        (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
        (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
        (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
        (("color", 0.4, 3), ("brightness", 0.6, 7)),
        (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
        (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
        (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
        (("color", 0.7, 7), ("translate_x", 0.5, 8)),
        (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
        (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
        (("brightness", 0.9, 6), ("color", 0.2, 8)),
        (("solarize", 0.5, 2), ("invert", 0.0, 3)),
        (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
        (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
        (("color", 0.9, 9), ("equalize", 0.6, 6)),
        (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
        (("brightness", 0.1, 3), ("color", 0.7, 0)),
        (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
        (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
        (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
        (("equalize", 0.8, 8), ("invert", 0.1, 3)),
        (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
    ),
    "imagenet": (
        (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
        (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
        (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
        (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
        (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
        (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
        (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
        (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
        (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
        (("rotate", 0.8, 8), ("color", 0.4, 0)),
        (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
        (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
        (("invert", 0.6, 4), ("equalize", 1.0, 8)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("rotate", 0.8, 8), ("color", 1.0, 2)),
        (("color", 0.8, 8), ("solarize", 0.8, 7)),
        (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
        (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
        (("color", 0.4, 0), ("equalize", 0.6, 3)),
        (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
        (("invert", 0.6, 4), ("equalize", 1.0, 8)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    ),
}


def numbers(names: tuple[str, ...], device: torch.device) -> Tensor:
    return constant(tuple(map(OPERATIONS.index, names)), device, torch.int64)


def autoaugment(levels: Tensor, policy: Policy, draws: Draws) -> Tensor:
    """AutoAugment (Cubuk et al. 2019): one sub-policy drawn per image; each of its two operations happens with its probability."""
    drawn = draws.integers(len(policy))
    for slot in zip(*policy, strict=True):
        names, probabilities, magnitudes = zip(*slot, strict=True)
        operations = numbers(names, levels.device)[drawn]
        happens = draws.uniform() < constant(probabilities, levels.device)[drawn]
        magnitude = draws.signs() * constant(magnitudes, levels.device)[drawn]
        levels = apply_operation(levels, torch.where(happens, operations, 0), magnitude, names)
    return levels


def randaugment(levels: Tensor, operations: int, draws: Draws, magnitude: float = 2.7) -> Tensor:
    """RandAugment (Cubuk et al. 2020): ``operations`` times one drawn per image, of all but invert, which it does not have."""
    names = OPERATIONS[:-1]
    for _ in range(operations):
        levels = apply_operation(levels, draws.integers(len(names)), draws.signs() * magnitude, names)
    return levels


class Drawn(NamedTuple):
    """Which operation each image drew, and its signed magnitude in [-9, 9]: both [N]."""

    choice: Tensor
    magnitude: Tensor

    def chosen(self, name: str) -> Tensor:
        return self.choice == OPERATIONS.index(name)

    def of(self, name: str) -> Tensor:
        """The magnitude of an operation: 0 where another was drawn."""
        return torch.where(self.chosen(name), self.magnitude, 0.0)


def apply_operation(levels: Tensor, choice: Tensor, magnitude: Tensor, names: Collection[str] = OPERATIONS) -> Tensor:
    """OPERATIONS[choice] with a signed magnitude in [-9, 9], both [N]: Pillow's levels, uint8 [N, C, H, W].

    At magnitude 9: shear by 0.3, translate by 150/331 of the side, rotate by 30 degrees, a factor of 1.9 (-9: 0.1) for brightness, color,
    contrast and sharpness, posterize to 4 bits, solarize all. ``names``: all that may have been drawn; what only others need is left out.
    """
    for operations, apply in KINDS.items():
        if set(operations).isdisjoint(names):
            continue
        if levels.device.type == "cpu":  # 4 times as fast. A GPU would have to be waited for, to know how many images drew a kind
            rows = torch.isin(choice, numbers(operations, levels.device)).nonzero()[:, 0]
            levels = levels.index_copy(0, rows, apply(levels[rows], Drawn(choice[rows], magnitude[rows])))
        else:
            levels = apply(levels, Drawn(choice, magnitude))
    return levels


def pixel_middles(levels: Tensor) -> tuple[Tensor, Tensor]:
    row, column = (torch.arange(s, device=levels.device) + 0.5 for s in levels.shape[2:])
    return row[:, None], column


def shear(levels: Tensor, drawn: Drawn) -> Tensor:
    """About the upper left corner, interpolated along the shear by Pillow's cubic convolution, as PaCo's code has it; FILL comes in."""
    (h, w), (row, column) = levels.shape[2:], pixel_middles(levels)
    along_x, along_y = drawn.chosen("shear_x").float().view(-1, 1, 1), drawn.chosen("shear_y").float().view(-1, 1, 1)
    x = column + drawn.of("shear_x").view(-1, 1, 1) / 30 * row
    y = row + drawn.of("shear_y").view(-1, 1, 1) / 30 * column
    left, top = (x - 0.5 * along_x).floor(), (y - 0.5 * along_y).floor()
    d = along_x * (x - 0.5 - left) + along_y * (y - 0.5 - top)
    d2, d3 = d * d, d * d * d
    sheared = levels.new_full((), 2**-10, dtype=torch.float32)  # or an even area would lose a level to rounding
    for step, weight in {-1: 2 * d2 - d - d3, 0: 1 - 2 * d2 + d3, 1: d + d2 - d3, 2: d3 - d2}.items():
        tap = pick(levels, (top + step * along_y).clamp(0, h - 1), (left + step * along_x).clamp(0, w - 1))
        sheared = sheared + weight[:, None] * tap
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    return sheared.clamp(0, 255).to(torch.uint8).masked_fill(~inside[:, None], FILL)


def translate_and_rotate(levels: Tensor, drawn: Drawn) -> Tensor:
    """Rotate about the middle; the nearest pixel is taken, and FILL comes in."""
    (h, w), (row, column) = levels.shape[2:], pixel_middles(levels)
    angle = drawn.of("rotate").view(-1, 1, 1) * math.radians(30 / 9)
    right, down = (150 / 331 / 9 * s * drawn.of(f"translate_{axis}").view(-1, 1, 1) for s, axis in ((w, "x"), (h, "y")))
    x = angle.cos() * (column - w / 2) + angle.sin() * (row - h / 2) + (w / 2 + right)
    y = angle.cos() * (row - h / 2) - angle.sin() * (column - w / 2) + (h / 2 + down)
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    moved = pick(levels, y.floor().clamp(0, h - 1), x.floor().clamp(0, w - 1))
    return moved.masked_fill(~inside[:, None], FILL)


def replace_levels(levels: Tensor, drawn: Drawn) -> Tensor:
    """What makes a new level of a level alone: one table of 256 per image and channel, and one read.

    The histograms cost one scatter of the pixels, 1.2 ms for 512 x 3 x 32 x 32 on a CPU core, where a product of as many floats takes 0.3;
    the same for the read. Counts are integers, so that the order in which a GPU adds them makes no difference.
    """
    n, c, h, w = levels.shape
    index, level = levels.flatten(2).long(), torch.arange(256, device=levels.device)
    counts = torch.zeros(n, c, 256, dtype=torch.int32, device=levels.device)
    counts.scatter_add_(2, index, torch.ones((), dtype=torch.int32, device=levels.device).expand(n, c, h * w))

    def image(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1)

    # From black for brightness, from the mean grey for contrast; then down to a multiple of a power of two, then 255 - level at and above a
    # threshold: of each 256 levels at rest there stays what it was.
    grey = image((grey_levels(levels.float()).mean((1, 2, 3)) + 0.5).floor() * drawn.chosen("contrast"))
    table = blend(level, grey, image((10 + drawn.of("brightness") + drawn.of("contrast")) / 10)).clamp(0, 255).int()
    bits = image((4 / 9 * drawn.of("posterize").abs()).round()).int()
    table = table >> bits << bits
    threshold = torch.where(drawn.chosen("invert"), 0.0, 256 / 9 * (9 - drawn.of("solarize").abs()))
    table = torch.where(table >= image(threshold), 255 - table, table).expand(n, c, 256)

    present = counts > 0
    low, high = present.int().argmax(2, keepdim=True).int(), 255 - present.flip(2).int().argmax(2, keepdim=True).int()
    stretched = (level.int() - low) * 255 // (high - low).clamp_min(1)
    table = torch.where(image(drawn.chosen("autocontrast")) & (high > low), stretched, table)

    step = (h * w - counts.gather(2, high.long())) // 255
    equal = ((step // 2 + counts.cumsum(2, dtype=torch.int32) - counts) // step.clamp_min(1)).clamp_max(255)
    table = torch.where(image(drawn.chosen("equalize")) & (step > 0), equal, table)
    return table.to(torch.uint8).gather(2, index).view(n, c, h, w)


def stretch_colors(levels: Tensor, drawn: Drawn) -> Tensor:
    """Away from grey for color, from the smoothed image for sharpness."""
    x, factor = levels.float(), (10 + drawn.of("color") + drawn.of("sharpness")) / 10
    other = torch.where(per_image(drawn.chosen("sharpness")), smooth(x), grey_levels(x))
    return blend(x, other, per_image(factor)).clamp(0, 255).to(torch.uint8)


def grey_levels(x: Tensor) -> Tensor:
    """Pillow's, in 65536ths; float32 has room for them. Of float levels, [N, 1, H, W]."""
    if x.shape[1] != 3:
        return x
    return ((x[:, :1] * 19595 + x[:, 1:2] * 38470 + x[:, 2:] * 7471 + 32768) / 65536).floor()


def smooth(x: Tensor) -> Tensor:
    """Of float levels: the mean of the 3 x 3 around, in which the middle counts five times; the border stays."""
    columns = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    around = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:] + 4 * x[:, :, 1:-1, 1:-1]
    result = x.clone()
    result[:, :, 1:-1, 1:-1] = (around / 13 + 0.5).floor()
    return result


KINDS = {  # what is done by one function, in one go
    ("shear_x", "shear_y"): shear,
    ("translate_x", "translate_y", "rotate"): translate_and_rotate,
    ("brightness", "contrast", "posterize", "solarize", "invert", "autocontrast", "equalize"): replace_levels,
    ("color", "sharpness"): stretch_colors,
}

# ---- recipes

# Without mean and std, which are those of the data.
AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": Augmentation(),
    "digits": Augmentation(rotate=15, shift=0.1, zoom=0.1),
    "cifar": Augmentation(crop_padding=4, flip=True, grayscale=0.2),  # Wang et al. 2021, both branches
    "cifar-plain": Augmentation(crop_padding=4, flip=True),  # LDAM-DRW's code, GLMC's
    "autoaugment": Augmentation(crop_padding=4, flip=True, autoaugment="cifar10", cutout=16),  # PaCo's code, one of the two views
    # PaCo's other view; its code also blurs: with probability 0.5, GPaCo's with 0.2.
    "sim": Augmentation(crop_scale=(0.2, 1.0), flip=True, color_jitter=0.5, color_jitter_probability=0.8, grayscale=0.2),
    "files": Augmentation(flip=True),  # the decoder has made the crops
}
