"""Class prototypes: the checks of those handed to a function, the modules that learn them, and what a class is worth beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..backends import sum_dtype
from ..backends._dtypes import no_autocast
from ..options import Reduction
from ..ranks import Ranks
from ..rows import wide_number, wide_rows
from ._frame import Loss, said

#: The share of all samples given to a class without any: its logarithm is finite, and the class all but leaves the denominator.
SHARE_OF_NONE = 1e-9


def check_prototypes(prototypes: Tensor, rows: Tensor, name: str = "prototypes", *, least: int = 1) -> None:
    """[C, D] beside rows [N, D]."""
    depth = rows.shape[1]
    if isinstance(prototypes, Tensor) and prototypes.ndim == 2 and prototypes.shape[1] != depth:
        swapped = prototypes.shape[0] == depth
        why = "the number of classes first" if swapped else f"as the features have {depth} dimensions"
        raise ValueError(f"{name} must have shape [classes, {depth}], {why}, got {list(prototypes.shape)}")
    _checks.rows(name, prototypes, columns=depth, least=least)
    _checks.on_device(name, prototypes, rows.device)


def meet_with_prototypes(
    ranks: Ranks,
    loss: str,
    features: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    reduction: Reduction,
    counts: dict[str, int] | None = None,
    sharded: bool = False,
    **alike: object,
) -> None:
    """Ranks.meet of a loss whose rows meet prototypes that all ranks have, or of which each has some."""
    ranks.meet(
        loss,
        features.device,
        {"rows": len(features), "prototypes": len(prototypes), **(counts or {})},
        depth=features.shape[1],
        dtype=features.dtype,
        requires_grad=features.requires_grad,
        prototypes=f"{'shards' if sharded else list(prototypes.shape)}, requires_grad={prototypes.requires_grad}",
        temperature=said(temperature),
        reduction=reduction,
        **alike,
    )


def log_prior(class_counts: Tensor, prototypes: Tensor, ranks: Ranks | None = None) -> Tensor:
    """The logarithm of each class's share of the samples, [C] in the sum dtype; a share of 0 counts as SHARE_OF_NONE.

    Of ``ranks`` each has some of the classes, and the samples are those of all.
    """
    _checks.counts("class_counts", class_counts, len(prototypes), prototypes.device, least=1 if ranks is None else 0)
    counts = class_counts.to(sum_dtype(prototypes.dtype))
    total = counts.sum()
    if ranks is not None:
        total = ranks.sum_here(class_counts.double().sum()).to(counts.dtype)
        value = _checks.readable(total)
        if value is not None and not 0 < value.item() < math.inf:
            raise ValueError(f"class_counts must be finite and not all 0 on all ranks, got a sum of {value.item():g}")
    share = counts / total
    return torch.where(share == 0, SHARE_OF_NONE, share).log()


def directions(count: int, dim: int, own: range) -> Tensor:
    """The rows ``own`` of unit(torch.randn(count, dim)), in memory for these: all are drawn, and on a CPU as they are drawn together."""
    few = 16 * max(1, 2**20 // (16 * dim))  # a CPU draws by 16 numbers, and fewer in another way
    starts = range(0, max(1, count - few), few)  # the last part is the longest
    parts = []
    for start in starts:
        stop = count if start == starts[-1] else start + few
        drawn = torch.randn(stop - start, dim)
        parts.append(wide_rows(drawn[max(own.start - start, 0) : max(own.stop - start, 0)], unit=True))
    return torch.cat(parts)


class PrototypeLoss(Loss):
    """A loss that learns ``prototypes`` [num_classes * per_class, dim], at first random directions, under their own name.

    ``class_counts`` are kept beside them: integers as integers, which a module brought to half precision does not round.
    """

    temperature: float | Tensor
    normalize: bool
    class_counts: Tensor | None

    def __init__(
        self,
        num_classes: int,
        dim: int,
        per_class: int = 1,
        class_counts: Tensor | Sequence[float] | None = None,
        own: range | None = None,
        **options: Any,
    ) -> None:
        """``own``: the classes whose prototypes and counts this module holds; all by default."""
        _checks.size("num_classes", num_classes)
        _checks.size("dim", dim)
        super().__init__(**options)
        self.num_classes, self.per_class = int(num_classes), per_class
        self.own = range(self.num_classes) if own is None else own
        rows = range(self.own.start * per_class, self.own.stop * per_class)
        self.prototypes = nn.Parameter(directions(self.num_classes * per_class, int(dim), rows))
        if class_counts is not None:
            class_counts = torch.as_tensor(class_counts).detach().clone()
            _checks.counts("class_counts", class_counts, self.num_classes, class_counts.device)
            class_counts = class_counts if own is None else class_counts[own.start : own.stop].clone()
        self.register_buffer("class_counts", class_counts)

    def logits(self, features: Tensor) -> Tensor:
        """z_i . p_c / tau: [N, D] -> [N, num_classes]; with several prototypes per class the log-sum-exp over them."""
        _checks.rows("features", features, columns=self.prototypes.shape[1])
        return self._logits(features, self.prototypes, self.temperature, self.normalize)

    def _logits(self, features: Tensor, prototypes: Tensor, temperature: float | Tensor, unit: bool) -> Tensor:
        with no_autocast(features):
            z, p = (wide_rows(x, unit) for x in (features, prototypes.to(features.dtype)))
            logits: Tensor = (z @ p.T / wide_number(temperature, z)).unflatten(1, (len(p) // self.per_class, self.per_class)).logsumexp(2)
            return logits

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, dim={self.prototypes.shape[1]}, {super().extra_repr()}"
