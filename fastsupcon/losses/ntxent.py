"""NT-Xent of Chen et al. 2020 (SimCLR, eq. 1), and with a memory its form of MoCo (He et al. 2020, eq. 1), as lightly has both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks, operators
from ..backends import select
from ..backends._dtypes import no_autocast
from ..blocks import logaddexp, quantities, terms
from ..options import Across, Backend, Reduction
from ..problem import Line, Pairs
from ..queue import NOBODY, MemoryQueue
from ..rows import wide_number, wide_rows
from ._contrast import numbers, put, shared
from ._frame import Loss, check_options, ranks_of, reduce, said

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def nt_xent_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: Reduction = "mean",
    queue: MemoryQueue | None = None,
    group: ProcessGroup | None = None,
    across: Across = "gather",
    backend: Backend = "auto",
) -> Tensor:
    """Two views of the same samples: each of the 2 B rows has to find its other view among the 2 B - 1 others.

        L_i = log sum_{k != i} exp(z_i . z_k / tau) - z_i . z_{i'} / tau,    i' = the other view of i

    Chen et al. 2020 (SimCLR), eq. 1. Their code adds the means over both views; here, as in lightly, it is one mean over all 2 B rows, half
    of that.

    With ``queue`` it is MoCo's (He et al. 2020, eq. 1): the rows of z0 have to find their row of z1 among what is in the queue, earlier
    rows of z1. The batch's other rows are no negatives, and z1's rows no anchors.

        L_i = log( exp(z0_i . z1_i / tau) + sum_{q in queue} exp(z0_i . q / tau) ) - z0_i . z1_i / tau

    In training mode z1 is put into the queue afterwards. A queue starts empty, and an empty one has no negatives: the first step's loss
    is 0. (lightly's starts full, of random rows; ``fastsupcon.integrations.lightly.NTXentLoss`` has that.) The gradient of z1 is that
    of the positive; where z1 comes from a momentum encoder, detach it.

    Args:
        z0: [B, D], the first view of each sample.
        z1: [B, D], the second, of z0's dtype and on its device.
        temperature: tau, a number or a 0-d tensor, which may require grad.
        normalize: bring the rows to unit length first. Without it the caller's rows are used as they are.
        reduction: "mean", "sum", or "none": [2 B], the rows of z0 first; with ``queue`` [B].
        queue: a MemoryQueue of rows of D.
        group: the process group whose ranks' rows meet, see ``fastsupcon.functional.supcon_loss``. A queue takes in
            all ranks' rows. None: this process alone.
        across: how rows of other ranks come: "gather" them all, or a rank's at a time by a "ring".
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        The loss in float32, for float64 rows in float64. Gradients have the dtype of their tensor. At equal similarities the loss is
        log(2 B - 1), with a queue log(1 + rows in it).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it.

    Cost: 4 B^2 D flops forward, as a pair of rows is visited once, and 12 to 16 B^2 D backward; memory O(B D), of which [z0; z1] is the
    one copy of the rows. With K rows in the queue 2 B K D and 4 B K D flops, and O(B D) memory beside the queue.
    """
    check_options(temperature, reduction, queue)
    ranks = ranks_of(group, across)
    least = 1 if ranks is None else 0
    _checks.rows("z0", z0, least=least)
    _checks.rows_like("z1", z1, "z0", z0, least=least)
    if len(z1) != len(z0):
        raise ValueError(f"z1 must have shape {list(z0.shape)} like z0, a row for each of z0's, got {list(z1.shape)}")
    if ranks is not None:
        ranks.meet(
            "nt_xent_loss",
            z0.device,
            {"samples": len(z0), "rows": 2 * len(z0)},
            depth=z0.shape[1],
            dtype=z0.dtype,
            requires_grad=z0.requires_grad or z1.requires_grad,
            temperature=said(temperature),
            queue=said(queue),
            normalize=normalize,
            reduction=reduction,
        )
    scale = 1 / wide_number(temperature, z0)
    if queue is None:
        samples = numbers(len(z0), z0.device, ranks, "samples").repeat(2)
        pairs = Pairs(torch.cat([z0, z1]), scale=scale, unit=normalize, row_keys=samples)
        if ranks is None:
            return operators.loss(pairs, Line(all=1, similarity=-1, reduction=reduction), backend=backend)
        with no_autocast(z0):
            q = quantities([shared(pairs, ranks, "rows", "rows")], "all", "similarity", backend=backend)
            return reduce(q.all - q.similarity, reduction, ranks=ranks)
    negatives, _ = queue.columns(z0)
    with no_autocast(z0):
        positive = (wide_rows(z0, normalize) * wide_rows(z1, normalize)).sum(1) * scale
        everything = positive
        if len(negatives):
            ((of_queue,), _) = terms(Pairs(z0, negatives, scale, normalize), ("all",), backend=backend)
            everything = logaddexp(positive, of_queue)
        elif not torch.compiler.is_compiling():  # which would trace how a backend is found
            select(backend, z0.device, z0.dtype, z0.shape[1])  # which refuses a backend that could not serve the next step
        loss = reduce(everything - positive, reduction, ranks=ranks)
    if queue.training:
        put(queue, z1, torch.full((len(z1),), NOBODY, device=z1.device), ranks, "samples")
    return loss


class NTXentLoss(Loss):
    """``fastsupcon.functional.nt_xent_loss`` with its options held: its help says what each argument means.

    Examples:
        >>> loss = NTXentLoss(temperature=0.5)(z0, z1)  # SimCLR; [B, D] each
        >>> loss = NTXentLoss(temperature=0.2, queue=MemoryQueue(65536, 128))(queries, keys.detach())  # MoCo
    """

    temperature: float | Tensor
    normalize: bool
    reduction: Reduction
    queue: MemoryQueue | None
    group: ProcessGroup | None
    across: Across
    backend: Backend

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
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
            normalize=normalize,
            reduction=reduction,
            queue=queue,
            group=group,
            across=across,
            backend=backend,
        )

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of two views of a batch.

        Args:
            z0: [B, D], the first view of each sample.
            z1: [B, D], the second.

        Returns:
            0-d, or with reduction="none" [2 B], with a queue [B]; float32, for float64 rows float64.
        """
        return nt_xent_loss(z0, z1, **self.options)

    if TYPE_CHECKING:
        __call__ = forward

    def chance_level(self, rows: int) -> float:
        """The loss of ``rows`` rows, 2 B of B samples, whose similarities are all equal: log(rows - 1); with a queue log(1 + its rows)."""
        _checks.size("rows", rows, least=2)
        return math.log(rows - 1 if self.queue is None else 1 + len(self.queue))
