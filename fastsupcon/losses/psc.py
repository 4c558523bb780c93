"""Prototypical supervised contrastive loss of Wang et al. 2021 (section 3.4), with one prototype per class (PSC) or several (MPSC)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks, operators
from ..backends._dtypes import no_autocast
from ..blocks import quantities
from ..options import DENOMINATORS, Across, Backend, Denominator, Reduction
from ..positives import own_prototypes
from ..problem import Line, Pairs
from ..ranks import Ranks
from ..rows import wide_number
from ._frame import check_options, class_labels, reduce
from ._prototypes import check_prototypes, meet_with_prototypes
from ._shards import ShardableLoss, against_shards, of_owners, ranks_of_shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def psc_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    prototypes_per_class: int = 1,
    denominator: Denominator = "negatives",
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    across: Across = "gather",
    sharded: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Prototypical supervised contrastive loss of Wang et al. 2021 (section 3.4): anchors against learned class prototypes.

        L_i = log sum_{c != y_i} exp(z_i . p_c / tau) - z_i . p_{y_i} / tau

    The own prototype is not in the denominator, so the loss can be negative; at equal similarities it is log(C - 1). With M prototypes per
    class (MPSC) all M own ones leave the denominator, and the positive term is their mean weighted by affinity,
    w_im = softmax_m(z_i . p_{y_i m} / tau), the weights taken as constants in the gradient.

    Args:
        features: [N, D].
        labels: integer [N] (or [N, 1]) in [0, C).
        prototypes: [C M, D], class c owning rows c M ... c M + M - 1. Cast to the dtype of ``features``.
        temperature: tau, a number or a 0-d tensor, which may require grad.
        prototypes_per_class: M.
        denominator: "negatives" (the paper's form), or "all": the own prototypes are put back, which for M = 1 is the cross-entropy of
            cosine logits.
        normalize: bring features and prototypes to unit length first.
        reduction: "mean", "sum" or "none".
        group: the process group whose losses are averaged together, see ``fastsupcon.functional.supcon_loss``. The prototypes are the same
            on all ranks, and their gradient is for DistributedDataParallel to average; no features travel. None: this process alone.
        across: how features of other ranks come where the prototypes are shared out: "gather" them all, or a rank's at a time by a "ring".
        sharded: the prototypes are shared out among the ranks of ``group``, for more classes than one of them has memory for.
            ``prototypes`` are this rank's, of the classes that follow those of the rank before it, as many as it has, or none. Labels
            number the classes of all ranks. Here all features travel (``across``). The prototypes' gradient is that of one process, and
            nobody must average it; those of the features and of the temperature are for DistributedDataParallel to average, as without.
            With reduction="none" it is that of the average over ranks of what they make of their losses.
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        The loss in float32, for float64 features in float64. Gradients have the dtype of their tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it. On a GPU and under
            torch.compile a label out of range makes the loss NaN: reading it back would wait for the device.

    Cost: 2 N C M D flops forward, 6 N C M D backward; memory O((N + C M) D).
    """
    classes = prototype_classes(prototypes, prototypes_per_class, least=int(not sharded))
    return _psc_loss(
        features,
        labels,
        prototypes,
        classes,
        temperature=temperature,
        prototypes_per_class=int(prototypes_per_class),
        denominator=denominator,
        normalize=normalize,
        reduction=reduction,
        group=group,
        across=across,
        sharded=sharded,
        backend=backend,
    )


def prototype_classes(prototypes: Tensor, per_class: int, *, least: int = 1) -> Tensor:
    """The class of each prototype: int64 [C M]."""
    _checks.rows("prototypes", prototypes, least=least)
    if not _checks.is_integer(per_class) or per_class < 1 or len(prototypes) % per_class:
        raise ValueError(f"prototypes_per_class must be a positive divisor of the {len(prototypes)} prototypes, got {per_class!r}")
    return torch.arange(len(prototypes), device=prototypes.device) // int(per_class)


def _psc_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    classes: Tensor,
    *,
    temperature: float | Tensor,
    prototypes_per_class: int,
    denominator: Denominator,
    normalize: bool,
    reduction: Reduction,
    group: ProcessGroup | None,
    across: Across,
    sharded: bool,
    backend: Backend,
) -> Tensor:
    """``classes`` are made once by the module: on a GPU making them is a launch of its own."""
    ranks = ranks_of_shards(group, across, sharded)
    _checks.rows("features", features, least=1 if ranks is None else 0)
    check_prototypes(prototypes, features, least=int(not sharded))
    _check_options(temperature, denominator, reduction)
    per_class = prototypes_per_class
    labels = class_labels(labels, len(features), features.device)
    if ranks is not None:
        alike: dict[str, Any] = {"prototypes_per_class": per_class, "denominator": denominator, "normalize": normalize}
        meet_with_prototypes(ranks, "psc_loss", features, prototypes, temperature, reduction, sharded=sharded, **alike)
    count = (ranks.total("prototypes") if sharded and ranks is not None else len(prototypes)) // per_class
    if count < 2:
        raise ValueError(f"prototypes must hold at least 2 classes, got {count}: there is no other to tell them from")
    z, p, scale = features, prototypes.to(features.dtype), 1 / wide_number(temperature, features)
    pairs = Pairs(z, p, scale, normalize, row_keys=labels, column_keys=classes)
    log_sum = "different" if denominator == "negatives" else "all"
    if per_class == 1 and ranks is None:
        line = Line(**{log_sum: 1.0}, similarity=-1, lone="nan", reduction=reduction)
        loss = operators.loss(pairs, line, backend=backend)
        if _checks.readable_nan(loss):  # a label out of range makes it so
            _checks.within("labels", labels, 0, count)
        return loss
    _checks.within("labels", labels, 0, count)
    with no_autocast(z):
        owners = ranks if sharded else None  # of the prototypes
        block = pairs if owners is None else against_shards(pairs, owners, per_class)
        if per_class == 1:
            q = quantities([block], log_sum, "similarity", backend=backend)
            own = q.similarity
        elif owners is None:
            q = quantities([block], log_sum, backend=backend)
            own = _positive(own_prototypes(z, p, labels, per_class, normalize) * scale)
        else:
            q = quantities([block], log_sum, "equal", backend=backend)
            own = _positive_of_shards(q.equal, pairs, p, labels, owners, per_class)
        return reduce(getattr(q, log_sum) - own, reduction, ranks=ranks)


def _positive(own: Tensor) -> Tensor:
    """The mean of the own similarities [N, M], weighted by affinity."""
    return (own.detach().softmax(1) * own).sum(1)


def _positive_of_shards(equal: Tensor, pairs: Pairs, p: Tensor, labels: Tensor, owners: Ranks, per_class: int) -> Tensor:
    """The same where each rank has some of the prototypes, from the log-sum over the own ones, ``equal`` [N].

    That has the gradient of their mean weighted by affinity, whose weights count as constants. Its value is put right by the rank that
    has them.
    """

    def positive(block: dict[str, Tensor], classes: Tensor) -> Tensor:
        return _positive(own_prototypes(block["rows"], p, classes, per_class, pairs.unit) * pairs.scale)

    value = of_owners(positive, labels, p, owners, per_class, rows=pairs.rows)
    return equal + (value - equal.detach())


def _check_options(temperature: float | Tensor, denominator: object, reduction: object) -> None:
    check_options(temperature, reduction)
    _checks.one_of("denominator", denominator, DENOMINATORS)


class PSCLoss(ShardableLoss):
    """``fastsupcon.functional.psc_loss`` with learned ``prototypes`` [num_classes * prototypes_per_class, embedding_dim].

    Hand the prototypes to the optimiser with the network's parameters: ``[*model.parameters(), *loss.parameters()]``.

    With a ``group`` and ``sharded=True`` rank r of R has the prototypes of the classes num_classes r // R up to num_classes (r + 1) // R
    alone, those that one process with the same seed would begin with. Their gradient is that of one process, and nobody must average it:
    keep the module out of what DistributedDataParallel or FSDP wraps. ``state_dict()`` has this rank's, ``whole_state_dict()`` those of
    all, and ``load_state_dict`` takes either, with any number of ranks.

    Args:
        num_classes: C.
        embedding_dim: D, that of the features and prototypes.
        temperature: as the other options, that of the function.

    Examples:
        >>> psc = PSCLoss(num_classes=10, embedding_dim=128, temperature=0.1)
        >>> psc(features, labels).backward()  # features [N, 128]
        >>> psc.logits(features).argmax(1)  # the nearest prototype's class
    """

    prototypes_per_class: int
    denominator: Denominator
    reduction: Reduction
    group: ProcessGroup | None
    across: Across
    sharded: bool
    backend: Backend
    classes: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        temperature: float | Tensor = 0.1,
        *,
        prototypes_per_class: int = 1,
        denominator: Denominator = "negatives",
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
        across: Across = "gather",
        sharded: bool = False,
        backend: Backend = "auto",
    ) -> None:
        _check_options(temperature, denominator, reduction)
        _checks.size("num_classes", num_classes, 2)
        _checks.size("embedding_dim", embedding_dim)
        _checks.size("prototypes_per_class", prototypes_per_class)
        super().__init__(
            num_classes,
            embedding_dim,
            int(prototypes_per_class),
            temperature=temperature,
            prototypes_per_class=int(prototypes_per_class),
            denominator=denominator,
            normalize=normalize,
            reduction=reduction,
            group=group,
            across=across,
            sharded=sharded,
            backend=backend,
        )
        self.register_buffer("classes", self._classes(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PSCLoss:
        super()._apply(fn, recurse)
        self.classes = self._classes()  # to_empty() leaves a buffer without values
        return self

    def _classes(self) -> Tensor:
        return prototype_classes(self.prototypes, self.prototypes_per_class, least=int(not self.sharded))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            features: [N, D].
            labels: integer [N], in [0, C).

        Returns:
            0-d, or [N] with reduction="none"; float32, for float64 features float64.
        """
        if self.sharded:
            self._check_apart()
        return _psc_loss(features, labels, self.prototypes, self.classes, **self.options)

    if TYPE_CHECKING:
        __call__ = forward

    def chance_level(self) -> float:
        """The loss of rows whose similarities are all equal: log((C - 1) M), with denominator="all" log(C M)."""
        return math.log((self.num_classes - (self.denominator == "negatives")) * self.prototypes_per_class)

    def extra_repr(self) -> str:
        return super().extra_repr().replace("dim=", "embedding_dim=", 1)
