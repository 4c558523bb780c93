"""Plain PyTorch in tiles of 512 x 512 pairs: any device, any floating dtype, O((N + M) D) memory.

In the self shape t_ij = t_ji unless there is a bias: then only tiles on and above the diagonal are computed, and each serves its rows and
its columns. Where the logits are *bounded*, exp(t_ij) needs no shift: one exponential serves every log-sum that the pair is in, and all its
gradients. Elsewhere the maxima are *running*: every log-sum of every tile takes its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import LOG_SUMS, Gradients, Pairs, Side, Terms
from ._dtypes import MOST_BOUNDED, exact, is_bounded
from .reference import line, line_backward, sides, through_unit

__all__ = ["backward", "forward", "line", "line_backward", "unusable"]

TILE = 512  # rows and columns; 1 MiB of fp32 logits stays in a core's L2


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    return None if dtype.is_floating_point else f"dtype {dtype} is not floating point"


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    serves_columns: bool  # False on the diagonal of a symmetric problem, where the rows are the columns
    bounded: bool
    similarities: Tensor  # s_ij
    values: Tensor  # bounded: exp(t_ij), and 0 where (i, j) is no pair; running: t_ij, and -inf there
    same: Tensor  # 1 where (i, j) is a pair of equal keys, else 0: PyTorch's loops over bool are four times slower
    room: list[Tensor]  # for two tiles more

    def over(self, name: str) -> Tensor:
        """What the sum ``name`` is over, and elsewhere what adds nothing to it; until the next call."""
        if name == "count":
            return self.same
        if name == "all":
            return self.values
        of, nothing = (self.similarities, 0) if name == "similarity" else (self.values, -torch.inf)
        if not self.bounded:
            return of.masked_fill(self.same == (name == "different"), nothing)
        if name == "different":
            return torch.addcmul(of, of, self.same, value=-1, out=self.room[0])
        return torch.mul(of, self.same, out=self.room[0])


class _Problem:
    def __init__(self, pairs: Pairs) -> None:
        self.a, self.b, self.a_norm, self.b_norm = sides(pairs)
        self.pairs, self.self_shape = pairs, pairs.columns is None
        self.symmetric = self.self_shape and pairs.bias is None
        self.bounded = _bounded(pairs, self.a, self.b)
        self.keys = _numbered(pairs, self.a.dtype)
        # made once: a MiB that is freed goes back to the system, and comes again page by page
        self.rooms = self.a.new_empty(5, min(TILE, len(self.a)) * min(TILE, len(self.b)))

    def tiles(self) -> Iterator[_Tile]:
        for rows in _blocks(len(self.a)):
            for columns in _blocks(len(self.b)):
                if not self.symmetric or columns.start >= rows.start:
                    yield self._tile(rows, columns)

    def _tile(self, rows: slice, columns: slice) -> _Tile:
        scale, bias, own_column = self.pairs.scale, self.pairs.bias, self.pairs.own_column
        shape = rows.stop - rows.start, columns.stop - columns.start
        similarities, values, same, *more = self.rooms[:, : shape[0] * shape[1]].view(-1, *shape)
        torch.mm(self.a[rows], self.b[columns].T, out=similarities).mul_(scale)
        logits = similarities if bias is None else torch.add(similarities, bias[columns], out=values)
        nothing = 0 if self.bounded else -torch.inf
        torch.exp(logits, out=values) if self.bounded else values.copy_(logits)
        same.zero_() if self.keys is None else torch.eq(self.keys[0][rows, None], self.keys[1][columns], out=same)
        if self.self_shape and rows == columns:
            values.fill_diagonal_(nothing)
            same.fill_diagonal_(0)
        elif own_column is not None:
            own = own_column[rows, None] == torch.arange(columns.start, columns.stop, device=own_column.device)
            values.masked_fill_(own, nothing)
            same.masked_fill_(own, 0)
        return _Tile(rows, columns, not self.symmetric or rows != columns, self.bounded, similarities, values, same, more)


def _bounded(pairs: Pairs, a: Tensor, b: Tensor) -> bool:
    """Whether exp(t_ij) needs no shift. Numbers that stand on a GPU are not waited for, and may be of any size.

    With at most one pair a row, a running log-sum is that pair's logit to the bit.
    """
    n, m, _ = pairs.shape
    if n <= 2 if pairs.columns is None else m - (pairs.own_column is not None) <= 1:
        return False
    scale, length, bias = pairs.scale, 1.0, 0.0
    if a.device.type == "cpu":
        scale, bias = float(scale), 0.0 if pairs.bias is None else float(pairs.bias.abs().max())
        length = 1.0 if pairs.unit else float(a.norm(dim=1).max() * b.norm(dim=1).max())
    elif isinstance(scale, Tensor) or pairs.bias is not None or not pairs.unit:
        return False
    return is_bounded(abs(scale) * length + bias)


def _numbered(pairs: Pairs, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Keys of rows and columns as small numbers in the sum dtype: PyTorch compares them into a tile seven times as fast as int64."""
    if pairs.row_keys is None:
        return None
    keys = pairs.row_keys if pairs.column_keys is None else torch.cat([pairs.row_keys, pairs.column_keys])
    numbers = torch.searchsorted(keys.sort().values, keys)
    if len(keys) <= 2**24:  # beyond, fp32 does not tell them apart
        numbers = numbers.to(dtype)
    return numbers[: len(pairs.rows)], numbers[-pairs.shape[1] :]


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, count)) for start in range(0, count, TILE))


@exact
def forward(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...], keep: bool) -> Terms:
    problem, (n, m, _) = _Problem(pairs), pairs.shape
    rows, columns = _nothing(row_names, problem.a, n), _nothing(column_names, problem.b, m)
    of_rows = dict(zip(row_names, rows, strict=True))
    of_columns = of_rows if problem.symmetric else dict(zip(column_names, columns, strict=True))
    for tile in problem.tiles():
        for name in dict.fromkeys((*row_names, *column_names)):
            terms = tile.over(name)
            for totals, span, dim in ((of_rows, tile.rows, 1), (of_columns, tile.columns, 0))[: 1 + tile.serves_columns]:
                if name not in totals:
                    continue
                total = totals[name][span]
                if name in LOG_SUMS:
                    torch.logaddexp(total, terms.sum(dim).log() if tile.bounded else terms.logsumexp(dim), out=total)
                else:
                    total += terms.sum(dim)
    norms = problem.a.new_zeros(pairs.norms_size)  # made anew in the backward
    return Terms(rows, columns, norms, problem.a.new_empty(0))


def _nothing(names: tuple[str, ...], like: Tensor, count: int) -> Tensor:
    """Quantities over no pair [len(names), count]."""
    totals = like.new_zeros(len(names), count)
    totals[: sum(name in LOG_SUMS for name in names)] = -torch.inf  # they are the first
    return totals


def _prepared(side: Side, bounded: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Per quantity q and a factor f: a pair's weight in the gradient is f exp(t) of a bounded log-sum, f exp(t - q) of a running one."""
    prepared = {}
    for name, value, grad in zip(side.names, side.values, side.grads, strict=True):
        if name in LOG_SUMS:
            grad = torch.where(value == -torch.inf, 0, grad)  # a log-sum over no pair passes nothing
            value = torch.where(value == -torch.inf, 0, value)
            if bounded:  # a q below every bounded t is over pairs of other processes alone
                grad = grad * torch.exp(-value.clamp_min(-MOST_BOUNDED))
        prepared[name] = value, grad
    return prepared


def _log_sum_weights(tile: _Tile, given: list[dict[str, tuple[Tensor, Tensor]]]) -> Tensor:
    """w_ij of the log-sums: what the bias has a part in."""
    weights = tile.room[1].zero_()
    for name in LOG_SUMS:
        terms = [of[name] for of in given if name in of]
        if terms and tile.bounded:
            weights.addcmul_(tile.over(name), _added([factor for _, factor in terms], tile))
        elif terms:
            values = tile.over(name)
            for log_sum, factor in terms:
                weights.addcmul_(torch.exp(values - log_sum), factor)
    return weights


def _added(factors: list[Tensor], tile: _Tile) -> Tensor:
    """Those of the rows [n, 1], of the columns [m], or their sum, in the room of the similarities, which the backward does not read."""
    return factors[0] if len(factors) == 1 else torch.add(*factors, out=tile.similarities)


@exact
def backward(pairs: Pairs, rows: Side, columns: Side, norms: Tensor, kept: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    problem = _Problem(pairs)
    a, b, self_shape = problem.a, problem.b, problem.self_shape
    da = torch.zeros_like(a) if needs[0] or needs[3] else None
    db = da if self_shape else torch.zeros_like(b) if needs[1] else None
    dbias = b.new_zeros(len(b)) if needs[2] else None
    of_rows = _prepared(rows, problem.bounded)
    of_columns = of_rows if problem.symmetric else _prepared(columns, problem.bounded)
    for tile in problem.tiles():
        given = [{name: (value[tile.rows, None], factor[tile.rows, None]) for name, (value, factor) in of_rows.items()}]
        given += [{name: (value[tile.columns], factor[tile.columns]) for name, (value, factor) in of_columns.items()}]
        weights = _log_sum_weights(tile, given)
        if dbias is not None:
            dbias[tile.columns] += weights.sum(0)
        if factors := [of["similarity"][1] for of in given if "similarity" in of]:
            weights.addcmul_(tile.same, _added(factors, tile))
        if da is not None:
            da[tile.rows].addmm_(weights, b[tile.columns])
        if db is not None and tile.serves_columns:
            db[tile.columns].addmm_(weights.T, a[tile.rows])
    return Gradients(
        through_unit(da * pairs.scale, a, problem.a_norm).to(pairs.rows.dtype) if needs[0] and da is not None else None,
        through_unit(db * pairs.scale, b, problem.b_norm).to(pairs.rows.dtype) if needs[1] and db is not None else None,
        dbias,
        (a * da).sum() * (0.5 if self_shape else 1) if needs[3] and da is not None else None,
    )
