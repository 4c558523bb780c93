"""Cross-entropy over cosines to class prototypes, of as many classes as there is memory for their prototypes.

Balanced softmax (Ren et al. 2020), logit adjustment (Menon et al. 2021), CosFace (Wang et al. 2018), ArcFace (Deng et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .. import _checks
from ..backends._dtypes import no_autocast
from ..blocks import quantities
from ..options import Across, Backend, Reduction
from ..problem import Pairs
from ..rows import wide_number
from ._frame import check_options, class_labels, reduce, said
from ._prototypes import check_prototypes, log_prior, meet_with_prototypes
from ._shards import ShardableLoss, against_shards, of_owners, ranks_of_shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def prototype_cross_entropy(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor = 1 / 64,
    class_counts: Tensor | None = None,
    margin: float = 0.0,
    angular_margin: float = 0.0,
    normalize: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    across: Across = "gather",
    sharded: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of cosine logits, with class priors and with margins on the own logit; the [N, C] logits are never held.

        L_i = log( e^{o_i} + sum_{c != y_i} exp(cos_ic / tau + b_c) ) - o_i,    cos_ic = z_i . p_c,    b_c = log(n_c / sum_k n_k)
        o_i = (cos(theta_i + angular_margin) - margin) / tau + b_{y_i},    theta_i = arccos cos_{i, y_i}

    ``class_counts`` n make it balanced softmax (Ren et al. 2020), which is logit adjustment (Menon et al. 2021, eq. 10) at its tau of 1;
    counts to the power of t give that of tau = t. They serve in training only: predictions are those of the cosines.

    ``margin`` is CosFace's, ``angular_margin`` ArcFace's. Of both the angle's comes first, as in Deng et al. (2019, eq. 4) and insightface
    (m3 and m2 there; 0.2 and 0.3 together). Beyond an angle of pi - m, where cos(theta + m) would rise again, the own cosine goes on as
    cos(theta) - m sin(m), as in the usual code; it falls by a jump there. Its gradient is the true one: insightface's module for PyTorch
    takes the angular margin's derivative for 1.

    With neither counts nor margins this is ``psc_loss(denominator="all")``.

    Args:
        features: [N, D].
        labels: integer [N] (or [N, 1]) in [0, C).
        prototypes: [C, D], one of each class. Cast to the dtype of ``features``.
        temperature: tau, a number or a 0-d tensor, which may require grad. The default is the scale of 64 of CosFace and ArcFace. With C
            classes the loss cannot fall below log(1 + (C - 1) exp(-1 / tau)) where the others' cosines are 0: for a million classes 3.8
            at psc_loss's tau of 0.1. From tau = 0.0234 on (and without counts) the kernels need no running maxima, and are faster.
        class_counts: integer or floating [C], of each class's samples. A class without any counts as 1e-9 of all samples: it all but leaves
            the denominator, and a label of it has a loss that is finite, but larger by about 21.
        margin: subtracted from the own cosine, at least 0; usually 0.35 or 0.4.
        angular_margin: in radians, added to the own angle, in [0, pi/2]; usually 0.5. Needs ``normalize``.
        normalize: bring features and prototypes to unit length first.
        ignore_index: rows of this label contribute 0 and leave the mean (which is 0 without any other).
        reduction: "mean", "sum" or "none": [N].
        group: the process group whose losses are averaged together, see ``fastsupcon.functional.supcon_loss``. The prototypes are the same
            on all ranks, and their gradient is for DistributedDataParallel to average; no features travel. None: this process alone.
        across: how features of other ranks come where the prototypes are shared out: "gather" them all, or a rank's at a time by a "ring".
        sharded: the prototypes are shared out among the ranks, see ``fastsupcon.functional.psc_loss``: ``prototypes`` and ``class_counts``
            are this rank's.
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        The loss in float32, for float64 features in float64. Gradients have the dtype of their tensor; that of the angle at cosines of +-1,
        where it has none, is 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it. On a GPU and under
            torch.compile a label out of range is an assertion on the device, and counts that are negative make the loss NaN: reading them
            back would wait.

    Cost: 2 N C D flops forward, 6 N C D backward; memory O((N + C) D).
    """
    ranks = ranks_of_shards(group, across, sharded)
    _checks.rows("features", features, least=1 if ranks is None else 0)
    check_prototypes(prototypes, features, least=int(not sharded))
    _check_options(temperature, margin, angular_margin, normalize, ignore_index, reduction)
    labels = class_labels(labels, len(features), features.device)
    if ranks is not None:
        alike: dict[str, Any] = {"margins": (margin, angular_margin), "normalize": normalize, "ignore_index": ignore_index}
        alike["class_counts"] = said(class_counts)
        meet_with_prototypes(ranks, "prototype_cross_entropy", features, prototypes, temperature, reduction, sharded=sharded, **alike)
    owners = ranks if sharded else None  # of the prototypes
    counted = None if ignore_index is None else labels != ignore_index
    labels = labels if counted is None else labels.masked_fill(~counted, 0)
    classes = len(prototypes) if owners is None else owners.total("prototypes")
    if classes < 2:
        raise ValueError(f"prototypes must hold at least 2 classes, got {classes}: there is no other to tell them from")
    _checks.within("labels", labels, 0, classes)
    with no_autocast(features):
        p, scale = prototypes.to(features.dtype), 1 / wide_number(temperature, features)
        bias = None if class_counts is None else log_prior(class_counts, p, owners)
        pairs = Pairs(features, p, scale, normalize, bias, labels, torch.arange(len(p), device=p.device))
        q = quantities([pairs if owners is None else against_shards(pairs, owners)], "different", "similarity", backend=backend)
        own = q.similarity
        if angular_margin > 0:
            own = _turned(own / scale, angular_margin) * scale
        own = own - margin * scale
        if bias is not None:
            own = own + (bias[labels] if owners is None else of_owners(lambda _, classes: bias[classes], labels, p, owners))
        losses = softplus(q.different - own, threshold=40)  # beyond, exp(-x) is nothing beside x in float64 too
        return reduce(losses, reduction, counted, ranks)


def _turned(cosine: Tensor, angle: float) -> Tensor:
    """cos(theta + angle) of cos(theta), or the continuation where that would be beyond pi.

    The sine's derivative is infinite at cosines of +-1, but that of a cosine by its rows is 0 there: the product is set to 0.
    """
    cosine = cosine.clamp(-1, 1)  # by rounding it may lie beyond
    square = (1 - cosine) * (1 + cosine)
    sine = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
    turned = cosine * math.cos(angle) - sine * math.sin(angle)
    return torch.where(cosine < -math.cos(angle), cosine - angle * math.sin(angle), turned)


def _check_options(
    temperature: float | Tensor, margin: float, angular_margin: float, normalize: bool, ignore_index: object, reduction: object
) -> None:
    check_options(temperature, reduction)
    _checks.number("margin", margin, 0, math.inf)
    _checks.number("angular_margin", angular_margin, 0, math.pi / 2)
    if angular_margin > 0 and not normalize:
        raise ValueError("angular_margin needs normalize=True, got False: rows of any length have no cosine")
    if ignore_index is not None and not _checks.is_integer(ignore_index):
        raise TypeError(f"ignore_index must be an int or None, got {type(ignore_index).__name__}")


class PrototypeCrossEntropyLoss(ShardableLoss):
    """``fastsupcon.functional.prototype_cross_entropy`` with learned ``prototypes`` [num_classes, dim].

    Hand the prototypes to the optimiser with the network's parameters: ``[*model.parameters(), *loss.parameters()]``.

    With a ``group`` and ``sharded=True`` each rank has its part of the classes' prototypes, as ``PSCLoss`` has and says.

    Args:
        num_classes: C.
        dim: D, that of the features and prototypes.
        class_counts: as the other options, that of the function; any sequence of numbers. Held as a buffer.

    Examples:
        >>> arcface = PrototypeCrossEntropyLoss(num_classes=1_000_000, dim=128, angular_margin=0.5)
        >>> arcface(features, labels).backward()  # features [N, 128]
        >>> balanced = PrototypeCrossEntropyLoss(4, 128, class_counts=[5000, 1077, 232, 50], temperature=0.1)
        >>> balanced.logits(features).argmax(1)  # the nearest prototype's class, without margin and prior
    """

    margin: float
    angular_margin: float
    ignore_index: int | None
    reduction: Reduction
    group: ProcessGroup | None
    across: Across
    sharded: bool
    backend: Backend

    def __init__(
        self,
        num_classes: int,
        dim: int,
        class_counts: Tensor | Sequence[float] | None = None,
        margin: float = 0.0,
        angular_margin: float = 0.0,
        *,
        temperature: float | Tensor = 1 / 64,
        normalize: bool = True,
        ignore_index: int | None = None,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
        across: Across = "gather",
        sharded: bool = False,
        backend: Backend = "auto",
    ) -> None:
        _check_options(temperature, margin, angular_margin, normalize, ignore_index, reduction)
        _checks.size("num_classes", num_classes, 2)
        super().__init__(
            num_classes,
            dim,
            class_counts=class_counts,
            margin=margin,
            angular_margin=angular_margin,
            temperature=temperature,
            normalize=normalize,
            ignore_index=ignore_index,
            reduction=reduction,
            group=group,
            across=across,
            sharded=sharded,
            backend=backend,
        )

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
        return prototype_cross_entropy(features, labels, self.prototypes, class_counts=self.class_counts, **self.options)

    if TYPE_CHECKING:
        __call__ = forward
