"""The hybrid network: one backbone, a projection head for the contrastive loss, a linear classifier."""

from __future__ import annotations

from itertools import pairwise

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


def make_backbone(name: str, channels: int, width: int) -> nn.Module:
    """A CIFAR ResNet by name, else timm's network of that name; ``num_features`` is the width of what it returns."""
    if name in CIFAR_RESNETS:
        return CifarResNet(int(name.removeprefix("resnet")), channels, width)
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"network must be one of {', '.join(CIFAR_RESNETS)}, or timm must be installed for {name!r}: {error}") from error
    if not timm.is_model(name):
        raise ValueError(f"network must be one of {', '.join(CIFAR_RESNETS)} or a timm model, got {name!r}")
    return timm.create_model(name, in_chans=channels, num_classes=0)


class HybridNetwork(nn.Module):
    """Backbone -> (head: one hidden layer -> embedding) and (linear classifier). At test time the classifier alone speaks."""

    def __init__(self, backbone: nn.Module, classes: int, hidden: int, embedding: int) -> None:
        super().__init__()
        self.backbone = backbone
        features = backbone.num_features
        self.head = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, embedding))
        self.classifier = nn.Linear(features, classes)

    def forward(self, images: Tensor, split: int) -> tuple[Tensor, Tensor]:
        """Rows before ``split`` go to the head, the others to the classifier; the backbone sees them in one batch."""
        features = self.backbone(images)
        return self.head(features[:split]), self.classifier(features[split:])


def freeze_below_classifier(network: HybridNetwork) -> None:
    """The second of two stages: weights and batch statistics of backbone and head stay as they are."""
    network.backbone.requires_grad_(False).eval()
    network.head.requires_grad_(False).eval()
