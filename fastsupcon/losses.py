"""The losses as modules: options, and for PSC the prototypes. The formulas are in :mod:`fastsupcon.functional`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks, functional
from .rows import unit_rows


class SupConLoss(nn.Module):
    """:func:`fastsupcon.functional.supcon_loss` with its options held; positional arguments and defaults are those of SupContrast.

    Note ``base_temperature``: the loss is multiplied by temperature / base_temperature. For the loss of the paper set both alike.

    >>> loss = SupConLoss(temperature=0.1, base_temperature=0.1, normalize=True)(features, labels)  # features [B, V, D]
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        lone_anchors: str = "zero",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.temperature("temperature", temperature)
        _checks.temperature("base_temperature", base_temperature)
        _checks.one_of("contrast_mode", contrast_mode, ("all", "one"))
        _checks.one_of("reduction", reduction, ("mean", "sum", "none"))
        _checks.one_of("lone_anchors", lone_anchors, ("zero", "skip", "error"))
        self.temperature = temperature  # an nn.Parameter is registered, and learned
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.normalize = normalize
        self.reduction = reduction
        self.lone_anchors = lone_anchors
        self.backend = backend

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return functional.supcon_loss(
            features,
            labels,
            mask,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            contrast_mode=self.contrast_mode,
            normalize=self.normalize,
            reduction=self.reduction,
            lone_anchors=self.lone_anchors,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={_number(self.temperature)}, contrast_mode={self.contrast_mode!r}, base_temperature={self.base_temperature}, "
            f"normalize={self.normalize}, reduction={self.reduction!r}, lone_anchors={self.lone_anchors!r}, backend={self.backend!r}"
        )


class PSCLoss(nn.Module):
    """:func:`fastsupcon.functional.psc_loss` with learned prototypes, ``prototypes`` [num_classes * prototypes_per_class, embedding_dim].

    Hand the prototypes to the optimiser with the network's parameters: ``[*model.parameters(), *loss.parameters()]``.

    >>> psc = PSCLoss(num_classes=10, embedding_dim=128, temperature=0.1)
    >>> psc(features, labels).backward()  # features [N, 128]
    >>> psc.logits(features).argmax(1)  # the nearest prototype's class
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        temperature: float | Tensor = 0.1,
        *,
        prototypes_per_class: int = 1,
        denominator: str = "negatives",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.temperature("temperature", temperature)
        _checks.one_of("denominator", denominator, ("negatives", "all"))
        _checks.one_of("reduction", reduction, ("mean", "sum", "none"))
        for name, value, least in (
            ("num_classes", num_classes, 2 if denominator == "negatives" else 1),
            ("embedding_dim", embedding_dim, 1),
            ("prototypes_per_class", prototypes_per_class, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        self.num_classes = num_classes
        self.temperature = temperature
        self.prototypes_per_class = prototypes_per_class
        self.denominator = denominator
        self.normalize = normalize
        self.reduction = reduction
        self.backend = backend
        self.prototypes = nn.Parameter(unit_rows(torch.randn(num_classes * prototypes_per_class, embedding_dim)))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return functional.psc_loss(
            features,
            labels,
            self.prototypes,
            temperature=self.temperature,
            prototypes_per_class=self.prototypes_per_class,
            denominator=self.denominator,
            normalize=self.normalize,
            reduction=self.reduction,
            backend=self.backend,
        )

    def logits(self, features: Tensor) -> Tensor:
        """z_i . p_c / tau: [N, D] -> [N, num_classes]; with several prototypes per class the log-sum-exp over them."""
        _checks.rows("features", features, columns=self.prototypes.shape[1])
        z, p = features, self.prototypes.to(features.dtype)
        if self.normalize:
            z, p = unit_rows(z), unit_rows(p)
        return (z @ p.T / self.temperature).unflatten(1, (self.num_classes, -1)).logsumexp(2)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.prototypes.shape[1]}, temperature={_number(self.temperature)}, "
            f"prototypes_per_class={self.prototypes_per_class}, denominator={self.denominator!r}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )


def _number(temperature: float | Tensor) -> float | str:
    return "learned" if isinstance(temperature, Tensor) else temperature
