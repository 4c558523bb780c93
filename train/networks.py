"""The hybrid network: one backbone, a projection head for the contrastive loss, a linear classifier."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoint
import torch
import torch.nn.functional as F
from packages import need
from torch import Tensor, nn

CIFAR_RESNETS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the name of the precision
ON_FEATURES = ("none", "mlp")  # networks for data that are features already


class BasicBlock(nn.Module):
    def __init__(self, wide_in: int, wide: int) -> None:
        super().__init__()
        self.stride = 1 if wide == wide_in else 2
        self.conv1 = nn.Conv2d(wide_in, wide, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        if self.stride == 2:  # option A of He et al.: subsample, and fill the new channels with zeros
            new = y.shape[1] - x.shape[1]
            # A mean over one pixel: the gradient of x[:, :, ::2, ::2] would be NCHW, and with it those of all blocks below.
            x = F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, new // 2, new - new // 2))
        return (x + y).relu()


class CifarResNet(nn.Sequential):
    """He et al.'s ResNet for 32 x 32: 3 x 3 stem, three stages of (depth - 2) / 6 blocks, features [N, 4 width]. ResNet-32: 0.46 M."""

    def __init__(self, depth: int, channels: int, width: int) -> None:
        stem = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        widths = [width] + [width * 2**stage for stage in range(3) for _ in range((depth - 2) // 6)]
        super().__init__(*stem, *[BasicBlock(a, b) for a, b in pairwise(widths)])
        self.num_features = widths[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.avg_pool2d(x, x.shape[2:]).flatten(1)  # not mean((2, 3)), whose gradient is NCHW whatever x is


class Features(nn.Module):
    """For data that are features already: each brought to mean 0 and variance 1 over the training images, then a hidden layer or none.

    Without that layer the classifier is a linear probe, on which a loss of the projection head has no influence. Mean and variance are
    fixed and part of the network: who loads it gives it features as they come. With dropout, in training alone, two views of an image
    differ.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, wide: int, dropout: float = 0.0, hidden: int | None = None) -> None:
        super().__init__()
        self.num_features, self.dropout = hidden or wide, dropout
        self.layer = nn.Sequential(nn.Linear(wide, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.register_buffer("mean", torch.zeros(wide))
        self.register_buffer("std", torch.ones(wide))

    def measure(self, features: Tensor) -> None:
        std, mean = torch.std_mean(features.float(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs(), std, 1.0))  # one that never changes stays 0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout((x - self.mean) / self.std, self.dropout, self.training))


def make_backbone(
    name: str, channels: int, width: int, *, pretrained: bool = False, image_size: int | None = None, dropout: float = 0.0
) -> nn.Module:
    """A CIFAR ResNet by name, else timm's network of that name; ``num_features`` is the width of what it returns.

    ``image_size`` is needed by networks made for one size, vision transformers among them, whose position embeddings timm then resamples;
    None is the size of their weights.
    """
    if pretrained:
        check_pretrained(name)
    if name in ON_FEATURES:
        return Features(channels, dropout, width if name == "mlp" else None)
    if name in CIFAR_RESNETS:
        return CifarResNet(int(name.removeprefix("resnet")), channels, width)
    timm, known = import_timm(name), timm_settings(name)
    size = {"img_size": image_size} if image_size is not None and known.fixed_input_size else {}
    return timm.create_model(name, in_chans=channels, num_classes=0, pretrained=pretrained, **size)


def check_pretrained(name: str) -> None:
    if not is_timm(name):
        raise ValueError(f"pretrained needs a timm network, got {name!r}, for which there are none: give a run's by weights")
    if not timm_settings(name).has_weights:
        raise ValueError(f"pretrained needs a network of which timm has weights, got {name!r}")


def import_timm(name: str) -> ModuleType:
    timm = need("timm", f"network {name!r}, which is none of {', '.join(CIFAR_RESNETS)},")
    if not timm.is_model(name):
        raise ValueError(f"network must be one of {', '.join(CIFAR_RESNETS)} or a timm model, got {name!r}")
    return timm


def timm_settings(name: str) -> Any:
    """What timm knows of a network's weights: input_size, mean, std, interpolation, crop_pct, fixed_input_size, ..."""
    found = import_timm(name).get_pretrained_cfg(name, allow_unregistered=True)
    if found is None:
        raise ValueError(f"network {name!r} must have settings of its weights in timm, and has none")
    return found


def is_timm(name: str) -> bool:
    return name not in ON_FEATURES and name not in CIFAR_RESNETS


class CosineClassifier(nn.Linear):
    """scale x the cosines of features and class weights."""

    def __init__(self, features: int, classes: int, scale: float) -> None:
        super().__init__(features, classes, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


class HybridNetwork(nn.Module):
    """Backbone -> (head: one hidden layer -> embedding) and (linear classifier). At test time the classifier alone speaks."""

    def __init__(self, backbone: nn.Module, classes: int, hidden: int, embedding: int, cosine: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        features = backbone.num_features
        self.head = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, embedding))
        self.classifier = CosineClassifier(features, classes, cosine) if cosine else nn.Linear(features, classes)

    def forward(self, images: Tensor, head_until: int, classifier_from: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of the first rows, logits of those from a row on, features of all: the backbone sees them in one batch."""
        features = self.backbone(images)
        return self.head(features[:head_until]), self.classifier(features[classifier_from:]), features


def freeze_below_classifier(network: HybridNetwork) -> None:
    """The second of two stages: weights and batch statistics of backbone and head stay as they are."""
    network.backbone.requires_grad_(False).eval()
    network.head.requires_grad_(False).eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a run's checkpoint or model.safetensors, or of a file of weights as timm or others saved it.

    Of a checkpoint that holds a running average they are the average's, as the run is evaluated.
    """
    if path.suffix != ".safetensors":
        state = checkpoint.load(path)
        if "ema" in state:
            return {name.removeprefix("module."): value for name, value in state["ema"].items() if name.startswith("module.")}
        return next((state[name] for name in ("network", "state_dict", "model") if isinstance(state.get(name), dict)), state)
    need("safetensors", f"weights {path}")
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"weights {path} does not exist") from None
    except Exception as error:  # safetensors has an error of its own
        raise ValueError(f"weights {path} is not a readable safetensors file: {error}") from error


def of_backbone(backbone: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """All of the backbone's tensors: of a run's network, or of weights that timm can read, from whichever code they come.

    What the file holds beside them, as a classifier, is left. timm itself, asked for a network without a classifier, would take a file that
    holds none of its tensors and leave the network at random.
    """
    prefix, own = "backbone.", backbone.state_dict()
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    elif translate := getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None):  # timm's, of this kind of network
        state = translate(state, backbone)
    if missing := [name for name in own if name not in state or state[name].shape != own[name].shape]:
        raise ValueError(f"weights {path} must hold this network, and lacks {len(missing)} of its {len(own)} tensors, first {missing[0]}")
    return {name: state[name] for name in own}


def load_weights(network: HybridNetwork, path: Path) -> None:
    """Begin from a file's backbone and, where it is a run's, what of its head and classifier has this shape."""
    given, own = read_weights(path), network.state_dict()
    backbone = of_backbone(network.backbone, given, path)
    kept = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    network.load_state_dict(own | kept | {f"backbone.{name}": value for name, value in backbone.items()})


def parameters_of(network: nn.Module) -> dict[str, int]:
    """Numbers of parameters: of backbone, classifier and head."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
