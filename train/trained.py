"""The network of a finished run, ready to use: without the settings, the losses and the data that it was trained with.

    from trained import load
    model = load("runs/X")
    probabilities = model(["one.png", "another.png"])  # [2, C], of model.classes

A run's folder says what its network is: config.json holds its sizes and the colours' mean and std, model.json the classes and the shape of
an image, both written as training starts. The weights are those that the run reported: best.pt where validation chose them, else last.pt;
the running average where there is one, with the classifier tau-normalised where it was evaluated so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoint
import numpy as np
import torch
import torch.nn.functional as F
from files import decode, middle, naming, to_rgb
from networks import HybridNetwork, make_backbone, read_weights
from PIL import Image
from torch import Tensor, nn

if TYPE_CHECKING:
    from data import Data

BATCH = 256  # images that go through the network at once


def whole(width: int, height: int, proportions: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest middle part of these proportions, (width, height): left, top, right, bottom."""
    scale = min(width / proportions[0], height / proportions[1])
    left, top = (max(0.0, (side - scale * part) / 2) for side, part in zip((width, height), proportions, strict=True))
    return left, top, width - left, height - top


# What of an image is seen: "middle" as the training code evaluates files, "whole" where the data set came as pixels.
CROPS = {"middle": lambda width, height, _: middle(width, height), "whole": whole}


def write_description(folder: Path, data: Data, image_size: int) -> None:
    """model.json: the classes, the shape of an image, and what of a file is seen."""
    if isinstance(data.train.images, Tensor):
        shape, crop = list(data.train.images.shape[1:]), "whole"
    else:
        shape, crop = [3, image_size, image_size], "middle"
    checkpoint.write_json(folder / "model.json", {"classes": data.classes, "shape": shape, "crop": crop})


class Classifier(nn.Module):
    """Images [N, C, H, W], floats in [0, 1] or uint8, to logits [N, classes]. The colours' mean and std are inside.

    Of a run on features, these [N, F] as features.py wrote them.
    """

    def __init__(self, network: HybridNetwork, mean: list[float], std: list[float], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone, self.classifier = network.backbone, network.classifier
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, *(1 for _ in shape[1:])))

    def features(self, images: Tensor) -> Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        return self.backbone((x - self.mean) / self.std)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


class Trained:
    """``network`` takes images to logits; ``classes`` are their names; ``shape`` is (channels, height, width) of what it takes.

    Of a run on features ``shape`` is (F,), and features [N, F] are what is meant by images here.

    Images are a tensor [N, *shape], floats in [0, 1] or uint8; or files and PIL images, one or several, which ``preprocess`` prepares.
    Everything is computed in fp32, without gradients; call ``network`` itself for gradients.
    """

    def __init__(self, folder: Path, weights: Path, description: dict[str, Any], network: HybridNetwork, device: torch.device) -> None:
        self.folder, self.weights, self.description, self.device = folder, weights, description, device
        self.classes: list[str] = description["classes"]
        self.shape: tuple[int, ...] = tuple(description["shape"])
        self.hybrid = network.to(device).eval()
        self.network = Classifier(network, description["mean"], description["std"], self.shape).to(device).eval()

    def __call__(self, images: Any) -> Tensor:
        """Probabilities [N, classes]."""
        return self._of_all(images, lambda batch: self.network(batch).softmax(1))

    def embed(self, images: Any) -> Tensor:
        """The projection head's output at unit length, [N, E]: the space of the feature loss. ValueError where a run has none."""
        if not self.description["embeds"]:
            raise ValueError(f"{self.folder} has no embedding, for its head was not trained (feature_loss 'none'): take features()")
        return self._of_all(images, lambda batch: F.normalize(self.hybrid.head(self.network.features(batch))))

    def features(self, images: Any) -> Tensor:
        """The backbone's output, [N, F]."""
        return self._of_all(images, self.network.features)

    def preprocess(self, image: Image.Image | str | Path) -> Tensor:
        """[channels, height, width] in [0, 1], as the run's evaluation prepares it, all but mean and std. ValueError if unreadable.

        Upright; the middle of the image (224 / 256 of its short side) for a run that was trained on files, else its largest middle part of
        the network's proportions; brought to size by Pillow's antialiased bilinear filter, which leaves an image of that size as it is;
        grey for a network of one channel.
        """
        self.check_takes_images()
        if isinstance(image, Image.Image):
            with naming("the image given"):
                picture = to_rgb(image)
        elif isinstance(image, str | Path):
            picture = decode(Path(image), str(image))
        else:
            raise TypeError(f"image must be a path or a PIL image, got {type(image).__name__}")
        channels, *sides = self.shape
        size = sides[1], sides[0]
        box = CROPS[self.description["crop"]](*picture.size, size)
        picture = picture.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        pixels = torch.from_numpy(np.array(picture.convert("L" if channels == 1 else "RGB")))
        return (pixels[None] if channels == 1 else pixels.permute(2, 0, 1)).contiguous().float() / 255

    def check_takes_images(self) -> None:
        if len(self.shape) != 3:
            raise ValueError(f"the run in {self.folder} takes features of images, tensors [N, {self.shape[0]}], and no images")

    @torch.no_grad()
    def _of_all(self, images: Any, compute: Any) -> Tensor:
        parts = [compute(batch.to(self.device)) for batch in self._batches(images)]
        if not parts:
            raise ValueError("images must hold one at least, got none")
        return torch.cat(parts)

    def _batches(self, images: Any) -> Iterator[Tensor]:
        if isinstance(images, Tensor):
            if images.dim() == 0 or images.shape[1:] != self.shape:
                raise ValueError(f"images must be [N, {', '.join(map(str, self.shape))}], got {list(images.shape)}")
            if images.dtype != torch.uint8 and not images.is_floating_point():
                raise ValueError(f"images must be floats in [0, 1] or uint8, got {images.dtype}")
            in_range = len(self.shape) == 3 and images.is_floating_point() and images.numel()
            if in_range and not (images.min() >= 0 and images.max() <= 1):
                raise ValueError(f"images of floats must lie in [0, 1], got {images.min():g} to {images.max():g}")
            yield from (part if part.dtype == torch.uint8 else part.float() for part in images.split(BATCH) if len(part))
            return
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        if not isinstance(images, Iterable):
            raise TypeError(f"images must be a tensor, or one or several paths and PIL images, got {type(images).__name__}")
        rest = iter(images)
        while part := list(islice(rest, BATCH)):
            yield torch.stack([self.preprocess(image) for image in part])


# ---- from a folder


def load(folder: str | Path, *, weights: str | None = None, device: str | torch.device = "cpu") -> Trained:
    """The network of the run in a folder.

    ``weights`` names another checkpoint in it, such as "epoch-10.pt" or the "last.pt" of a run that is not finished. Where the checkpoints
    are gone but model.safetensors is there, which holds the same weights, it is read. ValueError and FileNotFoundError say what is wrong.
    """
    folder = Path(folder)
    path = chosen_weights(folder) if weights is None else folder / weights
    config, about = read(folder / "config.json"), read(folder / "model.json")
    try:
        name, width, hidden, embedding = (config["network"][key] for key in ("network", "width", "hidden", "embedding"))
        cosine, tau, feature_loss = (config["method"][key] for key in ("cosine", "tau_normalisation", "feature_loss"))
        description = {key: about[key] for key in ("classes", "shape", "crop")} | {key: config["augment"][key] for key in ("mean", "std")}
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json and model.json in {folder} must hold what this version reads, and lack {error}") from error
    description["embeds"] = feature_loss != "none"
    shape = description["shape"]
    if len(shape) != 1 and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(f"the run in {folder} must be one of grey or colour images or of features, got inputs of shape {shape}")
    backbone = make_backbone(name, shape[0], width, image_size=shape[-1] if len(shape) == 3 else None)
    network = HybridNetwork(backbone, len(description["classes"]), hidden, embedding, cosine)
    state = evaluated_weights(path, tau)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the network that {folder / 'config.json'} describes: {error}") from error
    return Trained(folder, path, description, network, torch.device(device))


def read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected the folder of a run, which holds it")
    return checkpoint.read_json(path)


def chosen_weights(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist, expected the folder of a run")
    if not (folder / "metrics.json").exists():
        if within := sorted(str(path.parent) for path in folder.rglob("metrics.json")):
            raise ValueError(f"{folder} holds several runs, expected one of them: {', '.join(within)}")
        if (folder / "last.pt").exists():
            raise ValueError(f"the run in {folder} is not finished: go on with --resume {folder}, or name its weights, last.pt")
    metrics = read(folder / "metrics.json")
    if not isinstance(metrics, dict) or "chosen_by" not in metrics:
        raise ValueError(f"{folder / 'metrics.json'} must say what the weights were chosen_by: written by another version?")
    by_validation = metrics["chosen_by"] == "validation"
    path, exported = folder / ("best.pt" if by_validation else "last.pt"), folder / "model.safetensors"
    return exported if exported.exists() and not path.exists() else path


def evaluated_weights(path: Path, tau: float) -> dict[str, Tensor]:
    """Of the network as it is evaluated, as model.safetensors has it; checkpoints are before tau-normalisation."""
    state = read_weights(path)
    if tau and path.suffix != ".safetensors":
        from evaluate import tau_normalised

        state["classifier.weight"] = tau_normalised(state["classifier.weight"], tau)
        state["classifier.bias"] = torch.zeros_like(state["classifier.bias"])
    return state
