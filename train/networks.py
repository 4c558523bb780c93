"""The hybrid network: one backbone, a projection head for the contrastive loss, a linear classifier."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import checkpoint
import torch.nn.functional as F
from torch import Tensor, nn

CIFAR_RESNETS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


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
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new - new // 2))
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
        return super().forward(x).mean((2, 3))


class Features(nn.Flatten):
    """For data that are features already."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.num_features = wide


def make_backbone(name: str, channels: int, width: int, *, pretrained: bool = False) -> nn.Module:
    """A CIFAR ResNet by name, else timm's network of that name; ``num_features`` is the width of what it returns."""
    if name == "none":
        return Features(channels)
    if name in CIFAR_RESNETS:
        return CifarResNet(int(name.removeprefix("resnet")), channels, width)
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"network must be one of {', '.join(CIFAR_RESNETS)}, or timm must be installed for {name!r}: {error}") from error
    if not timm.is_model(name):
        raise ValueError(f"network must be one of {', '.join(CIFAR_RESNETS)} or a timm model, got {name!r}")
    return timm.create_model(name, in_chans=channels, num_classes=0, pretrained=pretrained)


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


def load_weights(network: HybridNetwork, path: Path) -> None:
    """Begin from the network of a run's last.pt or model.safetensors: its backbone, and of the head and classifier what has this shape."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = checkpoint.load(path)
        state = state.get("network", state)
    own = network.state_dict()
    missing = [name for name in own if name.startswith("backbone.") and (name not in state or state[name].shape != own[name].shape)]
    if missing:
        raise ValueError(f"weights {path} must hold this backbone, and lacks {len(missing)} of its tensors, first {missing[0]}")
    network.load_state_dict({name: state[name] if name in state and state[name].shape == own[name].shape else own[name] for name in own})


def parameters_of(network: nn.Module) -> dict[str, int]:
    """Numbers of parameters: of backbone, classifier and head."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
