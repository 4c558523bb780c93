"""Accuracies that others report: top-1 in %, each seen where ``seen`` says. A figure that was only remembered is not here.

Papers and toolboxes differ in augmentation, epochs and the epoch that they report, often the best on the test set: docs/methods.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    method: str  # a row of the table of methods
    data: str  # cifar10-lt or cifar100-lt with ResNet-32; imagenet-lt
    imbalance: int  # 0: the data set's own
    accuracy: float
    of: str  # whose figure it is
    seen: str


TRICKS = "github.com/zhangyongshun/BagofTricks-LT, documents/trick_gallery.md, 100 less its error rates"
TSC = "github.com/LTH14/targeted-supcon, supp_release.pdf, tables 10 and 11"
HYBRID = "a summary of arXiv 2103.14267; the paper itself was not at hand"
LISTED = "github.com/GZWQ/Awesome-Long-Tailed, README.md"
LOGITS = "github.com/google-research/google-research, logit_adjustment/README.md"
DECOUPLED = "github.com/facebookresearch/classifier-balancing, README.md"
PACO = "github.com/dvlab-research/Parametric-Contrastive-Learning, README.md"
BCL = "github.com/FlamieZhu/Balanced-Contrastive-Learning, README.md"
QUOTED = "README of a later method that compares with it (AMProCo)"
SUMMARIES = "summaries of two later papers that compare with it (VS-loss, LoRot)"


def _of(method: str, data: str, by_imbalance: dict[int, float], of: str, seen: str) -> list[Figure]:
    return [Figure(method, data, imbalance, accuracy, of, seen) for imbalance, accuracy in by_imbalance.items()]


def _tricks(method: str, cifar10: tuple[float, float], cifar100: tuple[float, float]) -> list[Figure]:
    errors = {"cifar10-lt": cifar10, "cifar100-lt": cifar100}
    return [
        Figure(method, data, imbalance, round(100 - error, 2), "Zhang et al. 2021", TRICKS)
        for data, pair in errors.items()
        for imbalance, error in zip((100, 50), pair, strict=True)
    ]


FIGURES: tuple[Figure, ...] = (
    *_tricks("ce", (29.64, 25.19), (61.68, 56.15)),
    *_tricks("ce-balanced", (27.55, 21.92), (64.76, 60.54)),
    *_tricks("focal", (28.44, 22.09), (62.78, 58.21)),
    *_tricks("cb-focal", (24.80, 21.01), (61.44, 57.63)),
    *_tricks("logit-adjustment", (22.46, 18.89), (57.01, 53.45)),
    *_tricks("crt", (25.01, 19.83), (59.74, 54.64)),
    *_tricks("tau-norm", (27.30, 20.22), (59.04, 54.31)),
    *_of("ldam-drw", "cifar10-lt", {100: 77.03}, "Cao et al. 2019", SUMMARIES),
    *_of("ldam-drw", "cifar100-lt", {100: 42.04}, "Cao et al. 2019", SUMMARIES),
    *_of("ldam-drw", "cifar10-lt", {100: 77.1}, "Li et al. 2022, 1000 epochs", TSC),
    *_of("ldam-drw", "cifar100-lt", {100: 42.3}, "Li et al. 2022, 1000 epochs", TSC),
    *_of("ce", "cifar10-lt", {100: 71.36}, "Menon et al. 2021, their code", LOGITS),
    *_of("ce", "cifar100-lt", {100: 39.87}, "Menon et al. 2021, their code", LOGITS),
    *_of("logit-adjustment", "cifar10-lt", {100: 80.92}, "Menon et al. 2021", LISTED),
    *_of("logit-adjustment", "cifar100-lt", {100: 43.89}, "Menon et al. 2021", LISTED),
    *_of("logit-adjustment", "cifar10-lt", {100: 77.89}, "Menon et al. 2021, their code", LOGITS),
    *_of("logit-adjustment", "cifar100-lt", {100: 44.06}, "Menon et al. 2021, their code", LOGITS),
    *_of("hybrid-sc", "cifar10-lt", {100: 81.40, 50: 85.36, 10: 91.12}, "Wang et al. 2021", HYBRID),
    *_of("hybrid-psc", "cifar10-lt", {100: 78.82, 50: 83.86, 10: 90.06}, "Wang et al. 2021", HYBRID),
    *_of("bcl", "cifar100-lt", {100: 51.9, 50: 56.4, 10: 64.6}, "Zhu et al. 2022", QUOTED),
    *_of("paco", "cifar100-lt", {100: 52.0}, "Cui et al. 2021", LISTED),
    *_of("kcl", "cifar10-lt", {100: 77.6}, "Li et al. 2022", TSC),
    *_of("kcl", "cifar100-lt", {100: 42.8}, "Li et al. 2022", TSC),
    *_of("ce", "imagenet-lt", {0: 44.4}, "Kang et al. 2020, ResNeXt-50", DECOUPLED),
    *_of("ce-balanced", "imagenet-lt", {0: 45.1}, "Kang et al. 2020, ResNeXt-50", DECOUPLED),
    *_of("crt", "imagenet-lt", {0: 49.6}, "Kang et al. 2020, ResNeXt-50", DECOUPLED),
    *_of("tau-norm", "imagenet-lt", {0: 49.4}, "Kang et al. 2020, ResNeXt-50", DECOUPLED),
    *_of("logit-adjustment", "imagenet-lt", {0: 51.1}, "Menon et al. 2021, ResNet-50", LISTED),
    *_of("kcl", "imagenet-lt", {0: 51.5}, "Kang et al. 2021, ResNet-50", TSC),
    *_of("bcl", "imagenet-lt", {0: 57.2}, "Zhu et al. 2022, ResNeXt-50", BCL),
    *_of("paco", "imagenet-lt", {0: 57.0}, "Cui et al. 2021, ResNet-50", PACO),
    *_of("paco", "imagenet-lt", {0: 58.2}, "Cui et al. 2021, ResNeXt-50", PACO),
    *_of("gpaco", "imagenet-lt", {0: 58.5}, "Cui et al. 2023, ResNet-50", PACO),
    *_of("gpaco", "imagenet-lt", {0: 58.9}, "Cui et al. 2023, ResNeXt-50", PACO),
)


def reported(method: str, data: str, imbalance: float | None) -> list[Figure]:
    """Of that method on that data; of one's own data, and of a copy of CIFAR in JPEG, nobody reports any."""
    return [f for f in FIGURES if (f.method, f.data, f.imbalance) == (method, data, imbalance or 0)]
