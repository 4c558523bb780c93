"""The operator over the rows of several processes: each asks for the quantities of its own rows, over all ranks' columns.

    from torch.distributed import group
    SupConLoss(0.1, group=group.WORLD)(features, labels)         # this rank's rows; the loss of all ranks' rows, the same on each

Every rank calls with its own rows, as many as it has. What comes back, value and gradient, is what one process would have with all rows
side by side, rank after rank.

**Forward.** Own rows meet the columns of all ranks, brought here at once ("gather") or a rank's at a time ("ring"); quantities of blocks
are joined. Quantities of columns, which CLIP's second direction needs, come of the same pass: each rank has its rows' share of every
column, and the shares are exchanged, a float each.

**Backward.** The weight of a pair is made of the log-sums of both its rows and of their incoming gradients (problem.py), so a rank that is
told these for all rows computes the whole gradient of its own ones: [N] floats travel, no gradient does. Where the columns are rows of
their own (CLIP's captions), each rank has some of both, and meets all ranks' columns with its rows, then all ranks' rows with its columns.

**Averages.** What is returned depends on all ranks' rows, and its gradient is that of the sum of what the ranks make of it. A loss that is
the same on every rank has R times its gradient, which DistributedDataParallel and FSDP divide by R when they average: so each parameter
has the gradient that one process would give it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators
from .backends import sum_dtype
from .blocks import join
from .problem import LOG_SUMS, Pairs, Side
from .ranks import Ranks, outside_of_graphs


class Shared(NamedTuple):
    """A problem of all ranks, of which ``pairs`` holds this one's rows, and its columns (None: the rows meet each other, without a bias).

    ``row_kind`` and ``column_kind`` are their names in ``ranks.counts``. ``pairs.own_column`` numbers this rank's own columns.
    """

    pairs: Pairs
    ranks: Ranks
    row_kind: str
    column_kind: str

    @property
    def columns_of_all(self) -> int:
        return self.ranks.total(self.column_kind)

    @outside_of_graphs
    def terms(self, row_names: tuple[str, ...], column_names: tuple[str, ...] = (), *, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """operators.terms of this rank's rows over all ranks' columns, and of its columns over all ranks' rows."""
        scale = self.pairs.scale
        inputs = self.pairs.rows, self.pairs.columns, scale if isinstance(scale, Tensor) else None
        of_rows, of_columns = _Terms.apply(*inputs, (self, row_names, column_names, backend))  # type: ignore[no-untyped-call]  # torch's
        return of_rows, of_columns


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor | None, scale: Tensor | None, call: tuple[Shared, tuple[str, ...], tuple[str, ...], str]
    ) -> tuple[Tensor, Tensor]:
        shared, row_names, column_names, backend = call
        ranks = shared.ranks
        of_rows = _over_nobody(row_names, len(rows), rows)
        of_columns = _over_nobody(column_names, shared.columns_of_all, rows)  # what this rank's rows add to all ranks' columns
        gathered: dict[str, Tensor] = {}
        for first, block in ranks.blocks(_columns(shared.pairs), shared.column_kind):
            if ranks.across == "gather":
                gathered = block
            if len(rows):
                found = operators._forward(_with_columns(shared, first, block), row_names, column_names, backend, False)
                of_rows = torch.stack(join(row_names, of_rows, found.rows))
                of_columns[:, first : first + len(block["rows"])] = found.columns
        if not column_names:
            of_columns = of_columns[:, : ranks.counts[shared.column_kind][ranks.rank]]
        else:
            of_columns, *others = (share.T for share in ranks.exchange(of_columns.T, shared.column_kind))
            for share in others:
                of_columns = torch.stack(join(column_names, of_columns, share))
        ctx.save_for_backward(rows, columns, scale, of_rows, of_columns, *gathered.values())
        without_rows = shared.pairs._replace(rows=None, columns=None)  # type: ignore[arg-type]  # which are saved for the backward
        ctx.call, ctx.gathered = (shared._replace(pairs=without_rows), *call[1:]), tuple(gathered)
        return of_rows, of_columns

    @staticmethod
    def backward(ctx: Any, row_grads: Tensor, column_grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("fastsupcon: second derivatives are not supported with group=: take them in one process")
        rows, columns, scale, of_rows, of_columns, *gathered = ctx.saved_tensors
        shared, row_names, column_names, backend = ctx.call
        pairs = shared.pairs._replace(rows=rows, columns=columns, scale=shared.pairs.scale if scale is None else scale)
        shared, ranks = shared._replace(pairs=pairs), shared.ranks
        needs_rows, needs_columns, needs_scale = ctx.needs_input_grad[:3]
        own_rows, own_columns = Side(row_names, of_rows, row_grads), Side(column_names, of_columns, column_grads)
        grads = _zeros(rows, needs_rows), _zeros(columns, needs_columns), _zeros(scale, needs_scale)

        def add(problem: Pairs, of_rows: Side, of_columns: Side, needs: tuple[bool, bool, bool, bool]) -> None:
            nothing = _nothing(rows)
            found = operators._backward(problem, of_rows, of_columns, _norms(problem, backend), nothing, needs, backend)
            for grad, piece in zip(grads, (found.rows, found.columns, found.scale), strict=True):
                if grad is not None and piece is not None:
                    grad += piece

        met = own_rows if columns is None else own_columns  # in the self shape a row has the same quantities as a column
        if needs_rows or needs_scale:
            known = dict(zip(ctx.gathered, gathered, strict=True))
            fresh = _sides(met) if known else _columns(pairs) | _sides(met)
            for first, block in ranks.blocks(fresh, shared.column_kind):
                block = known | block
                if len(rows):
                    add(_with_columns(shared, first, block), own_rows, _side(met.names, block), (needs_rows, False, False, needs_scale))
        if needs_columns:
            for _, block in ranks.blocks(_rows(shared) | _sides(own_rows), shared.row_kind):
                if len(columns):
                    add(_with_rows(shared, block), _side(row_names, block), own_columns, (False, True, False, False))
        of_scale = grads[2] if grads[2] is None or columns is not None else grads[2] / 2  # a pair's weight has both of its rows' shares
        return _cast(grads[0], rows), _cast(grads[1], columns), of_scale, None


# ---- Blocks: what travels of rows and columns, and the problem that they are met in -----------------------------------------------------


def _columns(pairs: Pairs) -> dict[str, Tensor]:
    own, keys = (pairs.rows, pairs.row_keys) if pairs.columns is None else (pairs.columns, pairs.column_keys)
    return _given(rows=own, keys=keys, bias=pairs.bias)


def _rows(shared: Shared) -> dict[str, Tensor]:
    return _given(rows=shared.pairs.rows, keys=shared.pairs.row_keys, own=_own_of_all(shared))


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if x is not None}


def _sides(side: Side) -> dict[str, Tensor]:
    return {"values": side.values.T, "grads": side.grads.T} if side.names else {}


def _side(names: tuple[str, ...], block: dict[str, Tensor]) -> Side:
    if not names:
        nothing = _nothing(block["rows"]).view(0, 1).expand(0, len(block["rows"]))
        return Side(names, nothing, nothing)
    return Side(names, block["values"].T, block["grads"].T)


def _own_of_all(shared: Shared) -> Tensor | None:
    """The column that is none of each own row, numbered among all ranks' columns; -1 for none."""
    pairs, first = shared.pairs, shared.ranks.first(shared.column_kind)
    if pairs.columns is None:
        return torch.arange(first, first + len(pairs.rows), device=pairs.rows.device)
    return None if pairs.own_column is None else torch.where(pairs.own_column < 0, -1, pairs.own_column + first)


def _within(own: Tensor | None, first: int, count: int) -> Tensor | None:
    """Numbers among ``count`` columns of which the first is number ``first``; -1 where they are none of them."""
    return None if own is None else torch.where((own >= first) & (own < first + count), own - first, -1)


def _with_columns(shared: Shared, first: int, block: dict[str, Tensor]) -> Pairs:
    """This rank's rows against a block of all columns."""
    own = _within(_own_of_all(shared), first, len(block["rows"]))
    return shared.pairs._replace(columns=block["rows"], column_keys=block.get("keys"), bias=block.get("bias"), own_column=own)


def _with_rows(shared: Shared, block: dict[str, Tensor]) -> Pairs:
    """A block of all rows against this rank's columns."""
    pairs = shared.pairs
    own = _within(block.get("own"), shared.ranks.first(shared.column_kind), len(pairs.columns))  # type: ignore[arg-type]  # there are some
    return pairs._replace(rows=block["rows"], row_keys=block.get("keys"), own_column=own)


def _norms(pairs: Pairs, backend: str) -> Tensor:
    """Those of a forward, which has them for each row and each column, at the cost of one column."""
    if not pairs.unit:
        return _nothing(pairs.rows)
    sides = (x for x in (pairs.rows, pairs.columns) if x is not None)
    return torch.cat([operators._forward(Pairs(x, x[:1], unit=True), ("all",), (), backend, False).norms[: len(x)] for x in sides])


# ---- Sums -------------------------------------------------------------------------------------------------------------------------------


def _over_nobody(names: tuple[str, ...], count: int, like: Tensor) -> Tensor:
    """The quantities of so many rows that meet nobody."""
    values = like.new_zeros(len(names), count, dtype=sum_dtype(like.dtype))
    for value, name in zip(values, names, strict=True):
        if name in LOG_SUMS:
            value.fill_(-torch.inf)
    return values


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=sum_dtype(like.dtype))


def _zeros(like: Tensor | None, needed: bool) -> Tensor | None:
    return torch.zeros_like(like, dtype=sum_dtype(like.dtype)) if needed and like is not None else None


def _cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)
