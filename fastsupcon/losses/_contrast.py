"""Whom the anchors of a batch meet: each other, other rows, the rows of a queue. Each is a block of columns, a problem of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Pairs
from ..queue import NOBODY, MemoryQueue

#: Keys of rows that are nobody's positives, from the first row on: in the self shape two of them would be each other's if they were alike.
ALONE = -(2**30)


class Keys(NamedTuple):
    """int64; equal ones are positives of each other."""

    rows: Tensor  # [N]
    columns: Tensor | None = None  # [M] of other columns


def ignored(keys: Keys, label: int) -> Keys:
    """The keys with rows and columns of this label nobody's positives."""
    alone = torch.arange(len(keys.rows), device=keys.rows.device) + ALONE
    columns = None if keys.columns is None else keys.columns.masked_fill(keys.columns == label, NOBODY)
    return Keys(torch.where(keys.rows == label, alone, keys.rows), columns)


def blocks_of(
    z: Tensor, anchors: int, keys: Keys | None, scale, unit: bool, columns: Tensor | None, queue: MemoryQueue | None
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
    if queue is not None:
        rows, of_queue = queue.columns(z)
        if len(queue):
            blocks.append(Pairs(own, rows, scale, unit, None, of_own, of_queue))
    return blocks


def pairs_of_each(blocks: list[Pairs]) -> int:
    """How many columns each anchor meets."""
    return sum(block.shape[1] - (block.columns is None or block.own_column is not None) for block in blocks)


def remember(queue: MemoryQueue, z: Tensor, keys: Keys, columns: Tensor | None, named: bool) -> None:
    """Puts the batch into a queue in training mode: the other columns where there are some, else the rows, under a key of nobody's where
    keys are no labels and the next batch's would be equal to them, or where the row is alone."""
    if not queue.training:
        return
    rows, of_rows = (z, keys.rows) if columns is None else (columns, keys.columns)
    is_alone = of_rows < ALONE + len(z) if named else torch.ones_like(of_rows, dtype=torch.bool)
    queue.put(rows, of_rows.masked_fill(is_alone, NOBODY))
