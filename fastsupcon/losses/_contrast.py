"""Whom the anchors of a batch meet: each other, other rows, the rows of a queue. Each is a block of columns, a problem of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Pairs
from ..queue import NOBODY, MemoryQueue


class Keys(NamedTuple):
    """int64; equal ones are positives of each other."""

    rows: Tensor  # [N]
    columns: Tensor | None = None  # [M] of other columns


def blocks_of(
    z: Tensor, anchors: int, keys: Keys | None, scale: float | Tensor, unit: bool, columns: Tensor | None, queue: MemoryQueue | None
) -> list[Pairs]:
    """Of the first ``anchors`` rows of z [N, D] against z, or against ``columns`` [M, D], and against what is in the queue.

    Empty where there is nobody to meet: one row alone.
    """
    count = z.shape[0]
    of_rows, of_columns = (None, None) if keys is None else keys
    own, of_own = (z, of_rows) if anchors == count else (z[:anchors], None if of_rows is None else of_rows[:anchors])
    blocks = []
    if columns is not None:
        blocks.append(Pairs(own, columns.to(z.dtype), scale, unit, None, of_own, of_columns))
    elif count > 1 and anchors == count:
        blocks.append(Pairs(z, None, scale, unit, None, of_rows))
    elif count > 1:
        blocks.append(Pairs(own, z, scale, unit, None, of_own, of_rows, torch.arange(anchors, device=z.device)))
    return [*blocks, *queue_block(queue, own, of_own, scale, unit)]


def queue_block(queue: MemoryQueue | None, z: Tensor, keys: Tensor | None, scale: float | Tensor, unit: bool) -> list[Pairs]:
    """Of rows z [N, D] and their keys against what is in the queue; none where nothing is. Without keys all of it is negatives."""
    if queue is None:
        return []
    rows, of_rows = queue.columns(z)
    return [Pairs(z, rows, scale, unit, None, keys, None if keys is None else of_rows)] if len(rows) else []


def pairs_of_each(blocks: list[Pairs]) -> int:
    """How many columns each anchor meets."""
    return sum(block.shape[1] - (block.columns is None or block.own_column is not None) for block in blocks)


def remember(queue: MemoryQueue, z: Tensor, keys: Keys, columns: Tensor | None, named: bool) -> None:
    """Puts the batch into a queue in training mode: the other columns where there are some, else the rows.

    Keys that are no labels (``named`` is False) are numbers of this batch, to which the next batch's would be equal: nobody's is put in.
    """
    if not queue.training:
        return
    rows, of_rows = (z, keys.rows) if columns is None or keys.columns is None else (columns, keys.columns)
    queue.put(rows, of_rows if named else torch.full_like(of_rows, NOBODY))
