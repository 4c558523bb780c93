"""Whom the anchors of a batch meet: each other, other rows, the rows of a queue. Each is a block of columns, a problem of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Block
from ..distributed import Shared
from ..problem import Pairs
from ..queue import NOBODY, MemoryQueue
from ..ranks import Ranks


class Keys(NamedTuple):
    """int64; equal ones are positives of each other."""

    rows: Tensor  # [N]
    columns: Tensor | None = None  # [M] of other columns


def shared(pairs: Pairs, ranks: Ranks | None, rows: str, columns: str) -> Block:
    """The block as all ranks have it, where there are several; rows and columns by their names in ``ranks.counts``."""
    return pairs if ranks is None else Shared(pairs, ranks, rows, columns)


def blocks_of(
    z: Tensor,
    anchors: int,
    keys: Keys | None,
    scale: float | Tensor,
    unit: bool,
    columns: Tensor | None,
    queue: MemoryQueue | None,
    ranks: Ranks | None,
) -> list[Block]:
    """Of the first ``anchors`` rows of z [N, D] against z, or against ``columns`` [M, D], and against what is in the queue.

    Empty where there is nobody to meet: one row alone. ``ranks.counts`` has "anchors", "rows" and, with columns, "keys".
    """
    count = z.shape[0]
    of_all, whole = (count, anchors == count) if ranks is None else (ranks.total("rows"), ranks.total("anchors") == ranks.total("rows"))
    of_rows, of_columns = (None, None) if keys is None else keys
    own, of_own = (z, of_rows) if anchors == count else (z[:anchors], None if of_rows is None else of_rows[:anchors])
    blocks: list[Block] = []
    if columns is not None:
        blocks.append(shared(Pairs(own, columns.to(z.dtype), scale, unit, None, of_own, of_columns), ranks, "anchors", "keys"))
    elif of_all > 1 and not whole:
        pairs = Pairs(own, z, scale, unit, None, of_own, of_rows, numbers(anchors, z.device, ranks, "rows"))
        blocks.append(shared(pairs, ranks, "anchors", "rows"))
    elif of_all > 1:
        blocks.append(shared(Pairs(z, None, scale, unit, None, of_rows), ranks, "rows", "rows"))
    return [*blocks, *queue_block(queue, own, of_own, scale, unit)]


def queue_block(queue: MemoryQueue | None, z: Tensor, keys: Tensor | None, scale: float | Tensor, unit: bool) -> list[Pairs]:
    """Of rows z [N, D] and their keys against what is in the queue; none where nothing is. Without keys all of it is negatives."""
    if queue is None:
        return []
    rows, of_rows = queue.columns(z)
    return [Pairs(z, rows, scale, unit, None, keys, None if keys is None else of_rows)] if len(rows) else []


def numbers(count: int, device: torch.device, ranks: Ranks | None, kind: str) -> Tensor:
    """Of the samples of this call, among those of all ranks: [count]."""
    first = 0 if ranks is None else ranks.first(kind)
    return torch.arange(first, first + count, device=device)


def scaled(block: Block, by: float) -> Block:
    """The block at ``by`` times its scale."""
    if isinstance(block, Pairs):
        rows, columns, scale, unit, bias, row_keys, column_keys, own_column = block  # torch 2.6 cannot compile _replace
        return Pairs(rows, columns, scale * by, unit, bias, row_keys, column_keys, own_column)
    return block._replace(pairs=block.pairs._replace(scale=block.pairs.scale * by))


def pairs_of_each(blocks: list[Block]) -> int:
    """How many columns each anchor meets."""
    total = 0
    for block in blocks:
        pairs = block if isinstance(block, Pairs) else block.pairs
        here = pairs.rows if pairs.columns is None else pairs.columns  # torch 2.6 knows no properties of a NamedTuple
        columns = here.shape[0] if isinstance(block, Pairs) else block.columns_of_all
        total += columns - int(pairs.columns is None or pairs.own_column is not None)
    return total


def remember(queue: MemoryQueue, z: Tensor, keys: Keys, columns: Tensor | None, named: bool, ranks: Ranks | None) -> None:
    """Puts the batch into a queue in training mode, all ranks' where there are several: other columns where there are some, else the rows.

    Keys that are no labels (``named`` is False) are numbers of this batch, to which the next batch's would be equal: nobody's is put in.
    """
    if not queue.training:
        return
    rows, of_rows, kind = (z, keys.rows, "rows") if columns is None or keys.columns is None else (columns, keys.columns, "keys")
    put(queue, rows, of_rows if named else torch.full_like(of_rows, NOBODY), ranks, kind)


def put(queue: MemoryQueue, rows: Tensor, keys: Tensor, ranks: Ranks | None, kind: str) -> None:
    """Into the queue: all ranks' rows, rank after rank, so that their queues hold the same."""
    if ranks is not None:
        rows, keys = ranks.gather(rows, kind), ranks.gather(keys, kind)
    queue.put(rows, keys)
