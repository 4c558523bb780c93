"""The operator over the rows of several processes: each asks for the quantities of its own rows, over all ranks' columns.

    from torch.distributed import group
    SupConLoss(0.1, group=group.WORLD)(features, labels)         # this rank's rows; the loss of all ranks' rows, the same on each
    PSCLoss(10**6, 128, group=group.WORLD, sharded=True)         # and a part of the prototypes on each rank

Every rank calls with its own rows, as many as it has. What comes back, value and gradient, is what one process would have with all rows
side by side, rank after rank.

**Forward.** Own rows meet the columns of all ranks, brought here at once ("gather") or a rank's at a time ("ring"); quantities of blocks
are joined. Quantities of columns, which CLIP's second direction needs, come of the same pass: each rank has its rows' share of every
column, and the shares are exchanged, a float each.

**Backward.** The weight of a pair is made of the log-sums of both its rows and of their incoming gradients (problem.py), so a rank that is
told these for all rows computes the whole gradient of its own ones: [N] floats travel, no gradient does. Where the columns are rows of
their own (CLIP's captions), each rank has some of both, and meets all ranks' columns with its rows, then all ranks' rows with its columns.

**Shards.** Columns that are too many to travel, a million prototypes, stay where they are, and the rows travel (``rows_travel``). Each
rank has the quantities of all ranks' rows over its own columns; they go home to the rows' ranks, a float each, and are joined there. In
the backward the rank computes the whole gradient of its columns, and its share of every row's, which goes home too: here gradients are
sent, and added up in an order that is the same each time, so that bits are.

**Averages.** What is returned depends on all ranks' rows, and its gradient is that of the sum of what the ranks make of it. A loss that is
the same on every rank has R times its gradient, which DistributedDataParallel and FSDP divide by R when they average: so each parameter
has the gradient that one process would give it. Nobody averages a shard, so its columns' gradient is divided here: it is that of one
process itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import operators
from .backends import sum_dtype
from .blocks import join
from .problem import LOG_SUMS, Gradients, Pairs, Side
from .ranks import Ranks, outside_of_graphs

_Of = TypeVar("_Of")


class Shared(NamedTuple):
    """A problem of all ranks, of which ``pairs`` holds this one's rows, and its columns (None: the rows meet each other, without a bias).

    ``row_kind`` and ``column_kind`` are their names in ``ranks.counts``. ``pairs.own_column`` numbers the columns of all ranks. With
    ``rows_travel`` the columns are shards.
    """

    pairs: Pairs
    ranks: Ranks
    row_kind: str
    column_kind: str
    rows_travel: bool = False

    @property
    def columns_of_all(self) -> int:
        return self.ranks.total(self.column_kind)

    @outside_of_graphs
    def terms(self, row_names: tuple[str, ...], column_names: tuple[str, ...] = (), *, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """operators.terms of this rank's rows over all ranks' columns, and of its columns over all ranks' rows."""
        rows, columns, scale, _, bias, *_ = self.pairs
        inputs = rows, columns, bias, scale if isinstance(scale, Tensor) else None
        of_rows, of_columns = _Terms.apply(*inputs, (self, row_names, column_names, backend))  # type: ignore[no-untyped-call]  # torch's
        return of_rows, of_columns

    def stays_and_travels(self, of_rows: _Of, of_columns: _Of) -> tuple[_Of, _Of]:
        """Of the two, that of the side that stays here first. Of what stays and travels, in this order, it gives rows' and columns'."""
        return (of_columns, of_rows) if self.rows_travel else (of_rows, of_columns)


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        call: tuple[Shared, tuple[str, ...], tuple[str, ...], str],
    ) -> tuple[Tensor, Tensor]:
        shared, row_names, column_names, backend = call
        ranks = shared.ranks
        kind_here, kind = shared.stays_and_travels(shared.row_kind, shared.column_kind)
        names_here, names = shared.stays_and_travels(row_names, column_names)
        count = ranks.counts[kind_here][ranks.rank]
        of_here = _over_nobody(names_here, count, rows)
        of_met = _over_nobody(names, ranks.total(kind), rows)  # what the side that stays here adds to all that comes by
        gathered: dict[str, Tensor] = {}
        bounded = rows.new_ones(1, dtype=sum_dtype(rows.dtype))  # while all blocks are
        for owner, block in ranks.blocks(_travelling(shared), kind):
            if owner is None:
                gathered = block
            if count and len(block["rows"]):
                first = ranks.first(kind, owner or 0)
                found = operators._forward(_met(shared, first, block), row_names, column_names, backend, False)
                found_here, found_met = shared.stays_and_travels(found.rows, found.columns)
                of_here = _joined(names_here, of_here, found_here)
                of_met[:, first : first + len(block["rows"])] = found_met
                if not shared.pairs.unit:
                    bounded = torch.minimum(bounded, found.norms)
        if not names:
            of_met = of_met[:, : ranks.counts[kind][ranks.rank]]
        else:
            of_met, *others = (share.T for share in ranks.exchange(of_met.T, kind))
            for share in others:
                of_met = _joined(names, of_met, share)
        if not shared.pairs.unit:
            bounded = (ranks.sum_here(1 - bounded) == 0).to(bounded.dtype)
        of_rows, of_columns = shared.stays_and_travels(of_here, of_met)
        ctx.save_for_backward(rows, columns, bias, scale, bounded, of_rows, of_columns, *gathered.values())
        without_rows = shared.pairs._replace(rows=None, columns=None, bias=None)  # type: ignore[arg-type]  # which are saved for the backward
        ctx.call, ctx.gathered = (shared._replace(pairs=without_rows), *call[1:]), tuple(gathered)
        return of_rows, of_columns

    @staticmethod
    def backward(ctx: Any, row_grads: Tensor, column_grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("fastsupcon: second derivatives are not supported with group=: take them in one process")
        rows, columns, bias, scale, bounded, of_rows, of_columns, *gathered = ctx.saved_tensors
        shared, row_names, column_names, backend = ctx.call
        pairs = shared.pairs._replace(rows=rows, columns=columns, bias=bias, scale=shared.pairs.scale if scale is None else scale)
        shared, inputs, needs = shared._replace(pairs=pairs), (rows, columns, bias, scale), ctx.needs_input_grad[:4]
        sides = Side(row_names, of_rows, row_grads), Side(column_names, of_columns, column_grads)
        known = dict(zip(ctx.gathered, gathered, strict=True))
        sums = Gradients(*(_zeros(x, need) for x, need in zip(inputs, needs, strict=True)))
        if shared.rows_travel:
            _add(sums, shared, sides, needs, known, bounded, backend)
            for shard in (sums.columns, sums.bias):
                if shard is not None:
                    shard /= shared.ranks.size
        else:
            of_row, of_column, of_bias, of_scale = needs
            if of_row or of_scale:
                _add(sums, shared, sides, (of_row, False, False, of_scale), known, bounded, backend)
            if of_column or of_bias:
                _add(sums, shared._replace(rows_travel=True), sides, (False, of_column, of_bias, False), {}, bounded, backend)
        if columns is None and sums.scale is not None:
            sums.scale.div_(2)  # a pair's weight has both of its rows' shares
        return *(_cast(grad, x) for grad, x in zip(sums, inputs, strict=True)), None


def _add(
    sums: Gradients,
    shared: Shared,
    sides: tuple[Side, Side],
    needs: tuple[bool, bool, bool, bool],
    known: dict[str, Tensor],
    bounded: Tensor,
    backend: str,
) -> None:
    """Gradients of the side that stays here, whole, as all that travels comes by, and where it is wanted of the side that travels."""
    ranks = shared.ranks
    kind_here, kind = shared.stays_and_travels(shared.row_kind, shared.column_kind)
    of_here, of_met = shared.stays_and_travels(*sides)
    if shared.pairs.columns is None:
        of_met = of_here  # a row has the same quantities as a column
    fresh = _sides(of_met) if known else _travelling(shared) | _sides(of_met)
    for owner, block in ranks.blocks(fresh, kind):
        block = known | block
        found = Gradients(torch.zeros_like(block["rows"]), None, None, None)
        if ranks.counts[kind_here][ranks.rank] and len(block["rows"]):
            problem = _met(shared, ranks.first(kind, owner or 0), block)
            of_rows, of_columns = shared.stays_and_travels(of_here, _side(of_met.names, block))
            norms = _norms(problem, backend) if problem.unit else bounded
            found = operators._backward(problem, of_rows, of_columns, norms, _nothing(block["rows"]), needs, backend)
            for total, grad in zip(sums[shared.rows_travel :], found[shared.rows_travel :], strict=True):
                if total is not None and grad is not None:
                    total += grad
        if shared.rows_travel and needs[0] and sums.rows is not None and found.rows is not None:
            for share in ranks.exchange(found.rows, kind, owner):
                sums.rows.add_(share)


# ---- Blocks: what travels, and the problem that it is met in ----------------------------------------------------------------------------


def _travelling(shared: Shared) -> dict[str, Tensor]:
    pairs = shared.pairs
    if shared.rows_travel:
        return _given(rows=pairs.rows, keys=pairs.row_keys, own=pairs.own_column)
    rows, keys = (pairs.rows, pairs.row_keys) if pairs.columns is None else (pairs.columns, pairs.column_keys)
    return _given(rows=rows, keys=keys, bias=pairs.bias)


def _met(shared: Shared, first: int, block: dict[str, Tensor]) -> Pairs:
    """This rank's rows against a block of all columns, or a block of all rows against this rank's columns. Number ``first`` begins it."""
    pairs, ranks, rows, keys = shared.pairs, shared.ranks, block["rows"], block.get("keys")
    if shared.rows_travel:
        here = ranks.first(shared.column_kind), ranks.counts[shared.column_kind][ranks.rank]
        return pairs._replace(rows=rows, row_keys=keys, own_column=_within(block.get("own"), *here))
    own = pairs.own_column
    if pairs.columns is None:
        own = torch.arange(len(pairs.rows), device=rows.device) + ranks.first(shared.row_kind)
    return pairs._replace(columns=rows, column_keys=keys, bias=block.get("bias"), own_column=_within(own, first, len(rows)))


def _within(own: Tensor | None, first: int, count: int) -> Tensor | None:
    """Numbers among ``count`` columns of which the first is number ``first``; -1 where they are none of them."""
    return None if own is None else torch.where((own >= first) & (own < first + count), own - first, -1)


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if x is not None}


def _sides(side: Side) -> dict[str, Tensor]:
    return {"values": side.values.T, "grads": side.grads.T} if side.names else {}


def _side(names: tuple[str, ...], block: dict[str, Tensor]) -> Side:
    if not names:
        nothing = _nothing(block["rows"]).view(0, 1).expand(0, len(block["rows"]))
        return Side(names, nothing, nothing)
    return Side(names, block["values"].T, block["grads"].T)


def _norms(pairs: Pairs, backend: str) -> Tensor:
    """Those of unit rows, which a forward has for each row and each column, at the cost of one column."""
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


def _joined(names: tuple[str, ...], a: Tensor, b: Tensor) -> Tensor:
    return torch.stack(join(names, a, b)) if names else a


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=sum_dtype(like.dtype))


def _zeros(like: Tensor | None, needed: bool) -> Tensor | None:
    return torch.zeros_like(like, dtype=sum_dtype(like.dtype)) if needed and like is not None else None


def _cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)
