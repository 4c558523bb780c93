"""A memory of the rows of earlier batches, to be contrasted with (MoCo, He et al. 2020; cross-batch memory, Wang et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _checks

#: The key of rows that are nobody's positives. Of 31 bits, as the CUDA kernels compare longer ones more slowly.
NOBODY = 2**30 - 1


class MemoryQueue(nn.Module):
    """The last ``size`` rows that went through a loss, without gradient, and their keys: more columns for the rows of the next batch.

    A loss with ``queue=`` contrasts its rows with the batch and with what is in the queue, and then, in training mode, puts the batch in:
    the newest rows stand first, the oldest fall out. Rows stand in the queue as the loss got them, before they are brought to unit length.

    A batch of any size may come; of one larger than the queue, the first ``size`` rows stay. Buffers are replaced and never written to, so
    that several losses of one backward (gradient accumulation) each keep the queue that they saw: a step costs one copy of size x dim.

    ``state_dict`` holds the rows [size, dim], their keys [size] and how many of them are filled.

    A loss with a process group puts all processes' rows into each one's queue, which so hold the same. Without a group, under
    DistributedDataParallel, every process has a queue of its own where the loss stands outside of the wrapped module, or with
    ``broadcast_buffers=False``. Else the first process's rows overwrite the others' at each forward, unseen from here: where batches
    differ in size, rows that are not filled are then contrasted with.

    Under torch.compile each number of filled rows is a graph of its own, and the compiler gives up after a few: compile the network and
    call the loss outside, or fill the queue first, with random rows as MoCo does:
    ``queue.put(torch.randn(size, dim), torch.full((size,), fastsupcon.queue.NOBODY))``.

    Args:
        size: most rows that are kept.
        dim: their dimension.
        dtype: of the rows kept; default torch's.

    Raises:
        TypeError, ValueError: an argument, or rows that come, have the wrong type, shape or device; the text names it.

    Examples:
        >>> loss = SupConLoss(temperature=0.1, normalize=True, queue=MemoryQueue(4096, 128))
        >>> loss(features, labels).backward()
    """

    rows: Tensor
    keys: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype | None = None) -> None:
        for name, value in (("size", size), ("dim", dim)):
            _checks.size(name, value)
        super().__init__()
        self.register_buffer("rows", torch.zeros(int(size), int(dim), dtype=dtype))
        self.register_buffer("keys", torch.zeros(int(size), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._length = 0  # as ``filled``, which on a GPU would have to be waited for
        self._version = self.filled._version

    def __len__(self) -> int:
        if not torch.compiler.is_compiling() and not self.filled.is_inference() and self.filled._version != self._version:
            self._read_length()  # others wrote to the buffers in place, as DistributedDataParallel does when it is built
        return self._length

    def _read_length(self) -> None:
        self._length, self._version = int(self.filled), self.filled._version

    def columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that are filled, and their keys. May be none.

        Args:
            like: [N, D], whose dtype the rows get and whose device they must be on.

        Returns:
            [length, D] and int64 [length].

        Raises:
            ValueError: the queue has another dimension or is on another device.
        """
        if like.shape[1] != self.rows.shape[1]:
            raise ValueError(f"queue holds rows of dimension {self.rows.shape[1]}, got features of dimension {like.shape[1]}")
        if like.device != self.rows.device:
            raise ValueError(f"queue must be on {like.device} like the features, got {self.rows.device}: move it or the loss there")
        length = len(self)
        return self.rows[:length].to(like.dtype), self.keys[:length]

    @torch.no_grad()
    def put(self, rows: Tensor, keys: Tensor) -> None:
        """Puts rows in front of those that are there; the oldest fall out.

        Args:
            rows: [N, D], of any floating dtype; the first ``size`` of them stay.
            keys: integer [N]; ``fastsupcon.queue.NOBODY`` for rows that are nobody's positives.

        Raises:
            TypeError, ValueError: they have the wrong type, dtype, shape or device.
        """
        size = self.rows.shape[0]
        _checks.rows("rows", rows, columns=self.rows.shape[1])
        _checks.on_device("rows", rows, self.rows.device)
        _checks.vector("keys", keys, len(rows), self.rows.device)
        self.rows = torch.cat([rows.detach().to(self.rows.dtype)[:size], self.rows[: max(0, size - len(rows))]])
        self.keys = torch.cat([keys.long()[:size], self.keys[: max(0, size - len(rows))]])
        self._hold(min(size, len(self) + len(rows)))

    def clear(self) -> None:
        """Forgets all rows."""
        self._hold(0)

    def _hold(self, length: int) -> None:
        self.filled = torch.full_like(self.filled, length)
        self._length, self._version = length, 0  # a tensor that nobody has written to yet

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._read_length()

    def extra_repr(self) -> str:
        return f"size={self.rows.shape[0]}, dim={self.rows.shape[1]}"
