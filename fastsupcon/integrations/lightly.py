"""lightly's NTXentLoss without the matrices of similarities, and the SupConLoss that lightly has not. lightly itself is not imported.

Tested with lightly 1.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _checks
from ..losses._frame import Loss
from ..losses.ntxent import nt_xent_loss
from ..losses.supcon import supcon_loss
from ..options import Backend
from ..queue import NOBODY, MemoryQueue
from ._world import world


class NTXentLoss(Loss):
    """lightly's NTXentLoss, its value and gradients, in O(B D) memory beside the memory bank.

    Without a memory bank SimCLR's loss over both views, with one MoCo's: ``fastsupcon.functional.nt_xent_loss`` has the formulas.

    The bank starts with the same random rows of unit length as lightly's at the same seed. As there, ``out1`` goes into it whenever
    ``out0`` requires a gradient, whether the module is in training mode or not. Where the batch divides its size it always holds lightly's
    rows; elsewhere it goes on to hold the newest ones, while lightly's drops the end of a batch that does not fit and starts over.

    ``state_dict`` holds the bank (``queue``), so that a run that is resumed goes on with it; lightly's does not.

    With ``gather_distributed`` each rank's rows meet those of all ranks of torch.distributed's default group, and a bank takes in all
    ranks' ``out1``. The gradient is lightly's, which DistributedDataParallel's average makes that of the loss of all ranks' rows. The value
    is that loss, the same on every rank, where lightly returns the mean over the rank's own rows; it is the average of those. Ranks may
    have unlike numbers of rows, which lightly cannot gather.

    Args:
        temperature: a number or a 0-d tensor, which may require grad.
        memory_bank_size: (rows, their dimension), or 0 for none.
        gather_distributed: whether all ranks' rows are contrasted. In one process, and where no process group is initialised when the
            loss is called, it says nothing, in lightly neither.
        backend: "auto", the fastest that serves these rows, or one by name.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it.

    Examples:
        >>> loss = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))
        >>> loss(queries, keys).backward()
    """

    temperature: float | Tensor
    memory_bank_size: int | Sequence[int]
    gather_distributed: bool
    backend: Backend

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        _checks.temperature("temperature", temperature)
        super().__init__(temperature=temperature, memory_bank_size=memory_bank_size, gather_distributed=gather_distributed, backend=backend)
        self.queue = _random_queue(memory_bank_size)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views of a batch.

        Args:
            out0: [B, D], the first view of each sample; with a memory bank the queries.
            out1: [B, D], the second.

        Returns:
            0-d, in float32, for float64 rows in float64.
        """
        if self.queue is not None:
            self.queue.train(out0.requires_grad)
        group = world(self.gather_distributed)
        return nt_xent_loss(out0, out1, temperature=self.temperature, queue=self.queue, group=group, backend=self.backend)

    if TYPE_CHECKING:
        __call__ = forward


class SupConLoss(Loss):
    """The supervised contrastive loss (Khosla et al. 2020, eq. 2) in lightly's style of call.

    Each of the 2 B rows has for positives its other view and both views of all samples of its class.
    ``fastsupcon.functional.supcon_loss`` has the formula.

    The rows are brought to unit length, as by all of lightly's losses. With labels that are all different it is ``NTXentLoss``.

    Args:
        temperature: a number or a 0-d tensor, which may require grad. The paper's best is 0.1.
        gather_distributed: as for ``NTXentLoss``.
        backend: "auto", the fastest that serves these rows, or one by name.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it.

    Examples:
        >>> loss = SupConLoss(temperature=0.1)
        >>> loss(out0, out1, labels).backward()  # [B, D], [B, D], [B]
    """

    temperature: float | Tensor
    gather_distributed: bool
    backend: Backend

    def __init__(self, temperature: float | Tensor = 0.1, gather_distributed: bool = False, *, backend: Backend = "auto") -> None:
        _checks.temperature("temperature", temperature)
        super().__init__(temperature=temperature, gather_distributed=gather_distributed, backend=backend)

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor) -> Tensor:
        """The loss of two views of a batch.

        Args:
            out0: [B, D], the first view of each sample.
            out1: [B, D], the second.
            labels: integer [B], any values.

        Returns:
            0-d, in float32, for float64 rows in float64.
        """
        group = world(self.gather_distributed)
        least = 1 if group is None else 0
        _checks.rows("out0", out0, least=least)
        _checks.rows_like("out1", out1, "out0", out0, least=least)
        if len(out1) != len(out0):
            raise ValueError(f"out1 must have shape {list(out0.shape)} like out0, got {list(out1.shape)}")
        _checks.vector("labels", labels, len(out0), out0.device)
        out = torch.cat([out0, out1])
        return supcon_loss(out, labels.repeat(2), temperature=self.temperature, normalize=True, group=group, backend=self.backend)

    if TYPE_CHECKING:
        __call__ = forward


def _random_queue(size: int | Sequence[int]) -> MemoryQueue | None:
    if _checks.is_integer(size) and size == 0:
        return None
    if not isinstance(size, Sequence) or len(size) != 2 or not all(_checks.is_integer(n) and n >= 0 for n in size):
        raise ValueError(f"memory_bank_size must be (rows, dimension), or 0 for no memory bank, got {size!r}")
    rows, dim = size
    if rows == 0:
        return None
    queue = MemoryQueue(rows, dim)
    bank = nn.functional.normalize(torch.randn(rows, dim), dim=1)
    queue.put(bank.flip(0), torch.full((rows,), NOBODY))  # lightly overwrites its first rows first, and a queue's last rows fall out first
    return queue
