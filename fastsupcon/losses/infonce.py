"""InfoNCE of van den Oord et al. 2018 (eq. 4) over pairs, in both directions as CLIP has it (Radford et al. 2021, figure 3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks, operators
from ..backends._dtypes import no_autocast
from ..blocks import Block, join, logaddexp, terms
from ..options import Across, Backend, Reduction
from ..problem import Line, Pairs
from ..queue import NOBODY, MemoryQueue
from ..rows import wide_number
from ._contrast import numbers, put, queue_block, shared
from ._frame import Loss, check_options, class_labels, ranks_of, reduce, said

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def info_nce_loss(
    a: Tensor,
    b: Tensor,
    keys: Tensor | None = None,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = True,
    normalize: bool = True,
    reduction: Reduction = "mean",
    queue: MemoryQueue | None = None,
    group: ProcessGroup | None = None,
    across: Across = "gather",
    backend: Backend = "auto",
) -> Tensor:
    """Row i of ``a`` and row i of ``b`` belong together (image and caption, query and document), and each has to find the other.

        a's direction:  L_i = log sum_j exp(a_i . b_j / tau) - a_i . b_i / tau
        b's direction:  L_j = log sum_i exp(a_i . b_j / tau) - a_j . b_j / tau

    a's direction alone is InfoNCE (van den Oord et al. 2018, eq. 4); half of each is CLIP's loss (Radford et al. 2021, figure 3). Both come
    from one pass over the logits. With ``keys`` all pairs of equal keys are positives, and the second term of each direction is the mean
    over them (L_out of Khosla et al. 2020, which UniCL of Yang et al. 2022 has in both directions): several captions of an image,
    duplicates of a document.

    Args:
        a: [N, D].
        b: [N, D], of a's dtype and on its device.
        keys: integer [N] (or [N, 1], or [1, N]), any values; rows of equal keys are each other's positives. None: every row has its own
            pair alone.
        negatives: [K, D], of a's dtype: more columns for a's direction, positives of nobody (hard negatives: passages that answer none of
            the queries). They do not enter b's direction: there the candidates are rows of a, and these are of b's kind.
        temperature: tau, a number or a 0-d tensor, which may require grad.
        symmetric: half of a's direction and half of b's; False: a's direction alone.
        normalize: bring all rows to unit length first. Without it the caller's rows are used as they are.
        reduction: "mean" over the pairs, "sum", or "none": [N], for each pair the mean of its directions.
        queue: earlier rows of b, without gradient: more columns for a's direction, and for the same reason not for b's. With ``keys`` those
            of equal keys are positives, without they are all negatives. In training mode b is put in afterwards. MoCo is
            symmetric=False with b from the momentum encoder; for both directions add two such losses, with a queue for each encoder.
        group: the process group whose ranks' rows meet, see ``fastsupcon.functional.supcon_loss``: each rank has pairs of its own, whose
            rows meet those of all ranks, and the negatives of all ranks. A queue takes in all ranks' rows. None: this process alone.
        across: how rows of other ranks come: "gather" them all, or a rank's at a time by a "ring".
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        The loss in float32, for float64 rows in float64. Gradients have the dtype of their tensor. At equal similarities the loss is
        log N, of a's direction log(N + K + rows in the queue).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it.

    Cost: with M columns 2 N M D flops forward and 6 N M D backward, for both directions; memory O((N + M) D). The columns are those of b;
    negatives and queue are blocks of their own, read where they lie.
    """
    check_options(temperature, reduction, queue)
    ranks = ranks_of(group, across)
    least = 1 if ranks is None else 0
    _checks.rows("a", a, least=least)
    _checks.rows_like("b", b, "a", a, least=least)
    if len(b) != len(a):
        raise ValueError(
            f"b must have shape {list(a.shape)} like a, a row for each of a's, got {list(b.shape)}. Columns that are nobody's positive go "
            "into negatives=[K, D]; rows with several positives into a and b once for each of them, with keys=[N]"
        )
    if keys is not None:
        keys = class_labels(keys, len(a), a.device, "keys")
    if negatives is not None:
        _checks.rows_like("negatives", negatives, "a", a, least=least)
    if ranks is not None:
        ranks.meet(
            "info_nce_loss",
            a.device,
            {"pairs": len(a), "negatives": 0 if negatives is None else len(negatives)},
            depth=a.shape[1],
            dtype=a.dtype,
            requires_grad=(a.requires_grad, b.requires_grad),
            keys=keys is not None,
            negatives=said(negatives),
            temperature=said(temperature),
            symmetric=symmetric,
            queue=said(queue),
            normalize=normalize,
            reduction=reduction,
        )
    scale = 1 / wide_number(temperature, a)
    more = [] if negatives is None else [shared(Pairs(a, negatives, scale, normalize), ranks, "pairs", "negatives")]
    more += queue_block(queue, a, keys, scale, normalize)
    own = numbers(len(a), a.device, ranks, "pairs") if keys is None else keys
    pairs = Pairs(a, b, scale, normalize, row_keys=own, column_keys=own)

    if not symmetric and not more and ranks is None:
        loss = operators.loss(pairs, Line(all=1, similarity=-1, reduction=reduction), backend=backend)
    else:
        with no_autocast(a):
            losses = single_positives if keys is None else _several_positives
            loss = reduce(losses(shared(pairs, ranks, "pairs", "pairs"), more, symmetric, backend), reduction, ranks=ranks)
    if queue is not None and queue.training:
        put(queue, b, torch.full((len(b),), NOBODY, device=b.device) if keys is None else keys, ranks, "pairs")
    return loss


def single_positives(pairs: Block, more: list[Block], symmetric: bool, backend: Backend) -> Tensor:
    """[N], where keys are the numbers of the pairs: the column that is a row's one positive has it too, so both share its similarity."""
    (everything, similarity), of_columns = terms(pairs, ("all", "similarity"), ("all",) if symmetric else (), backend=backend)
    for block in more:
        everything = logaddexp(everything, terms(block, ("all",), backend=backend)[0].squeeze(0))
    if symmetric:
        everything = (everything + of_columns.squeeze(0)) / 2
    losses: Tensor = everything - similarity
    return losses


def _several_positives(pairs: Block, more: list[Block], symmetric: bool, backend: Backend) -> Tensor:
    """[N]; every row and every column has a positive, its own pair."""
    names = ("all", "similarity", "count")
    of_rows, of_columns = terms(pairs, names, names[:2] if symmetric else (), backend=backend)
    everything, similarity, count = of_rows
    batch_count = count  # of a row, and as rows and columns have the same keys, of the column beside it
    for block in more:
        of_block = terms(block, names, backend=backend)[0]
        everything, similarity, count = join(names, (everything, similarity, count), of_block)
    losses: Tensor = everything - similarity / count
    if symmetric:
        everything, similarity = of_columns
        losses = (losses + everything - similarity / batch_count) / 2
    return losses


class InfoNCELoss(Loss):
    """``fastsupcon.functional.info_nce_loss`` with its options held: its help says what each argument means.

    A learned temperature is an ``nn.Parameter`` of 0 dimensions; hand it to the optimiser with the network's parameters.

    Examples:
        >>> loss = InfoNCELoss(temperature=0.07)(image_features, text_features)  # [N, D] each
        >>> loss = InfoNCELoss(0.05, symmetric=False)(queries, passages, negatives=hard_negatives)  # [N, D], [N, D], [K, D]
    """

    temperature: float | Tensor
    symmetric: bool
    normalize: bool
    reduction: Reduction
    queue: MemoryQueue | None
    group: ProcessGroup | None
    across: Across
    backend: Backend

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        symmetric: bool = True,
        *,
        normalize: bool = True,
        reduction: Reduction = "mean",
        queue: MemoryQueue | None = None,
        group: ProcessGroup | None = None,
        across: Across = "gather",
        backend: Backend = "auto",
    ) -> None:
        check_options(temperature, reduction, queue)
        ranks_of(group, across)
        super().__init__(
            temperature=temperature,
            symmetric=symmetric,
            normalize=normalize,
            reduction=reduction,
            queue=queue,
            group=group,
            across=across,
            backend=backend,
        )

    def forward(self, a: Tensor, b: Tensor, keys: Tensor | None = None, negatives: Tensor | None = None) -> Tensor:
        """The loss of a batch of pairs.

        Args:
            a: [N, D].
            b: [N, D]; row i belongs to row i of a.
            keys: integer [N]: pairs of equal keys are each other's positives too.
            negatives: [K, D], further candidates for the rows of a.

        Returns:
            0-d, or [N] with reduction="none"; float32, for float64 rows float64.
        """
        return info_nce_loss(a, b, keys, negatives, **self.options)

    if TYPE_CHECKING:
        __call__ = forward

    def chance_level(self, pairs: int) -> float:
        """The loss of so many pairs whose similarities are all equal: log(pairs), in a's direction log(pairs + rows in the queue)."""
        _checks.size("pairs", pairs, least=1)
        of_a = math.log(pairs + (0 if self.queue is None else len(self.queue)))
        return (of_a + math.log(pairs)) / 2 if self.symmetric else of_a
