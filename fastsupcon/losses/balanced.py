"""Balanced contrastive loss (BCL) of Zhu et al. 2022: every class counts alike in the denominator, and is there in every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from ..backends import sum_dtype
from ..backends._dtypes import no_autocast
from ..blocks import Block, logaddexp, quantities
from ..options import Across, Backend, Reduction
from ..problem import Pairs
from ..rows import wide_number
from ._contrast import numbers, shared
from ._frame import check_options, class_labels, ranks_of, reduce, rows_of
from ._prototypes import PrototypeLoss, check_prototypes, meet_with_prototypes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def balanced_supcon_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    across: Across = "gather",
    backend: Backend = "auto",
) -> Tensor:
    """Balanced contrastive loss of Zhu et al. (CVPR 2022): SCL whose denominator is a sum over classes of means over their members.

        L_i = log sum_c mean_{k in B_c} exp(z_i . z_k / tau) - mean_{p in B_{y_i}} z_i . z_p / tau

    B_c are the batch's rows of class c, without row i itself, and the class's prototype: averaging takes the head classes' weight away,
    and the prototype stands for a class that the batch lacks ("class-averaging" and "class-complement" of the paper). So every anchor has a
    positive; one whose class has no other row has the prototype alone. At equal similarities the loss is log C.

    The mean over the anchor's own class is over its |B| members without the anchor, as in the authors' code.

    Args:
        features: [N, D], or [B, V, ...] with V views of B samples: trailing dimensions are flattened, views become rows view-major
            (N = V B).
        labels: integer [B] (or [B, 1], or [1, B]) in [0, C).
        prototypes: [C, D], one of each class, learned or made by a network (the authors' is a projection of the classifier's weights).
            Cast to the dtype of ``features``.
        temperature: tau, a number or a 0-d tensor, which may require grad.
        normalize: bring features and prototypes to unit length first.
        reduction: "mean" over anchors, "sum", or "none": [N].
        group: the process group whose ranks' rows meet, see ``fastsupcon.functional.supcon_loss``. Prototypes are
            the same on all ranks. None: this process alone.
        across: how rows of other ranks come: "gather" them all, or a rank's at a time by a "ring".
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        The loss in float32, for float64 features in float64. Gradients have the dtype of their tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it. On a GPU and under
            torch.compile a label out of range is an assertion on the device: reading it back would wait.

    Cost: 2 N (N + C) D flops forward, 6 N (N + C) D backward; memory O((N + C) D), of which rows and prototypes side by side are a part.
    """
    ranks = ranks_of(group, across)
    z, views = rows_of(features, least=1 if ranks is None else 0)
    check_prototypes(prototypes, z)
    check_options(temperature, reduction)
    classes, (rows, _) = len(prototypes), z.shape
    labels = class_labels(labels, features.shape[0], z.device)
    _checks.within("labels", labels, 0, classes)
    if ranks is not None:
        meet_with_prototypes(ranks, "balanced_supcon_loss", z, prototypes, temperature, reduction, views=views, normalize=normalize)
    with no_autocast(z):
        labels = labels.repeat(views)
        keys = torch.cat([labels, torch.arange(classes, device=z.device)])
        members = torch.zeros(classes, dtype=torch.int64, device=z.device).scatter_add(0, keys, torch.ones_like(keys))  # waits for nobody
        if ranks is not None:
            members = ranks.sum_here(members) - (ranks.size - 1)  # each has counted the prototypes
        bias = -members.to(sum_dtype(z.dtype)).log()[keys]
        p, itself, scale = prototypes.to(z.dtype), numbers(rows, z.device, ranks, "rows"), 1 / wide_number(temperature, z)
        if ranks is None:
            blocks: list[Block] = [Pairs(z, torch.cat([z, p]), scale, normalize, bias, labels, keys, itself)]
        else:
            of_rows = Pairs(z, z, scale, normalize, bias[:rows], labels, labels, itself)
            blocks = [shared(of_rows, ranks, "rows", "rows"), Pairs(z, p, scale, normalize, bias[rows:], labels, keys[rows:])]
        q = quantities(blocks, "different", "equal", "similarity", "count", backend=backend)
        own = q.equal + (1 / q.count).log1p()  # the bias divides by the members with the anchor, count + 1
        return reduce(logaddexp(q.different, own) - q.similarity / q.count, reduction, ranks=ranks)


class BalancedSupConLoss(PrototypeLoss):
    """``fastsupcon.functional.balanced_supcon_loss`` with learned ``prototypes`` [num_classes, dim].

    Hand the prototypes to the optimiser with the network's parameters: ``[*model.parameters(), *loss.parameters()]``.

    Args:
        num_classes: C.
        dim: D, that of the features and prototypes.
        temperature: as the other options, that of the function.

    Examples:
        >>> balanced = BalancedSupConLoss(num_classes=10, dim=128, temperature=0.1)
        >>> balanced(features, labels).backward()  # features [B, V, 128]
    """

    reduction: Reduction
    group: ProcessGroup | None
    across: Across
    backend: Backend

    def __init__(
        self,
        num_classes: int,
        dim: int,
        temperature: float | Tensor = 0.1,
        *,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
        across: Across = "gather",
        backend: Backend = "auto",
    ) -> None:
        check_options(temperature, reduction)
        ranks_of(group, across)
        super().__init__(
            num_classes,
            dim,
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            group=group,
            across=across,
            backend=backend,
        )

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            features: [N, D], or [B, V, ...] of V views.
            labels: integer [N] or [B], in [0, C).

        Returns:
            0-d, or [N] with reduction="none"; float32, for float64 features float64.
        """
        return balanced_supcon_loss(features, labels, self.prototypes, **self.options)

    if TYPE_CHECKING:
        __call__ = forward
