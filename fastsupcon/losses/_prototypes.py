"""Class prototypes: the checks of those handed to a function, the modules that learn them, and what a class is worth beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..backends import sum_dtype
from ..backends._dtypes import no_autocast
from ..ranks import Ranks
from ..rows import wide_rows
from ._frame import Loss, said

#: The share of all samples given to a class without any: its logarithm is finite, and the class all but leaves the denominator.
SHARE_OF_NONE = 1e-9


def check_prototypes(prototypes: Tensor, rows: Tensor, name: str = "prototypes") -> None:
    """[C, D] beside rows [N, D]."""
    _checks.rows(name, prototypes, columns=rows.shape[1])
    _checks.on_device(name, prototypes, rows.device)


def meet_with_prototypes(
    ranks: Ranks,
    loss: str,
    features: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    reduction: str,
    counts: dict[str, int] | None = None,
    **alike: object,
) -> None:
    """Ranks.meet of a loss whose rows meet prototypes that all ranks have."""
    ranks.meet(
        loss,
        features.device,
        {"rows": len(features), **(counts or {})},
        depth=features.shape[1],
        dtype=features.dtype,
        requires_grad=features.requires_grad,
        prototypes=list(prototypes.shape),
        temperature=said(temperature),
        reduction=reduction,
        **alike,
    )


def log_prior(class_counts: Tensor, prototypes: Tensor) -> Tensor:
    """The logarithm of each class's share of the samples, [C] in the sum dtype; a share of 0 counts as SHARE_OF_NONE."""
    _checks.counts("class_counts", class_counts, len(prototypes), prototypes.device)
    counts = class_counts.to(sum_dtype(prototypes.dtype))
    share = counts / counts.sum()
    return torch.where(share == 0, SHARE_OF_NONE, share).log()


class PrototypeLoss(Loss):
    """A loss that learns ``prototypes`` [num_classes * per_class, dim], at first random directions, under their own name.

    ``class_counts`` are kept beside them: integers as integers, which a module brought to half precision does not round.
    """

    temperature: float | Tensor
    normalize: bool
    class_counts: Tensor | None

    def __init__(
        self, num_classes: int, dim: int, per_class: int = 1, class_counts: Tensor | Sequence[float] | None = None, **options: Any
    ) -> None:
        _checks.size("num_classes", num_classes)
        _checks.size("dim", dim)
        super().__init__(**options)
        self.num_classes = int(num_classes)
        self.prototypes = nn.Parameter(wide_rows(torch.randn(self.num_classes * per_class, int(dim)), unit=True))
        if class_counts is not None:
            class_counts = torch.as_tensor(class_counts).detach().clone()
            _checks.counts("class_counts", class_counts, self.num_classes, class_counts.device)
        self.register_buffer("class_counts", class_counts)

    def logits(self, features: Tensor) -> Tensor:
        """z_i . p_c / tau: [N, D] -> [N, num_classes]; with several prototypes per class the log-sum-exp over them."""
        return self._logits(features, self.temperature, self.normalize)

    def _logits(self, features: Tensor, temperature: float | Tensor, unit: bool) -> Tensor:
        _checks.rows("features", features, columns=self.prototypes.shape[1])
        with no_autocast(features):
            z, p = (wide_rows(x, unit) for x in (features, self.prototypes.to(features.dtype)))
            logits: Tensor = (z @ p.T / temperature).unflatten(1, (self.num_classes, -1)).logsumexp(2)
            return logits

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, dim={self.prototypes.shape[1]}, {super().extra_repr()}"
