"""Plain PyTorch in tiles of 512 x 512 pairs: any device, any floating dtype, O((N + M) D) memory.

In the self shape without a bias t_ij = t_ji: only tiles on and above the diagonal are computed, and each serves its rows and its columns.
Where the logits are *bounded*, exp(t_ij) needs no shift: one exponential serves every log-sum that the pair is in, and all its
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
    similarities: Tensor  # s_ij
    values: Tensor  # bounded: exp(t_ij), and 0 where (i, j) is no pair; running: t_ij, and -inf there
    same: Tensor  # whether (i, j) is a pair of equal keys
    bounded: bool
    mirrored: bool  # also stands for its transposed tile, which is not computed

    def over(self, name: str) -> Tensor:
        """The values of the pairs that the log-sum ``name`` is over, and elsewhere what adds nothing to it."""
        if name == "all":
            return self.values
        nothing = 0 if self.bounded else -torch.inf
        return torch.where(self.same, *((self.values, nothing) if name == "equal" else (nothing, self.values)))

    def quantity(self, name: str, dim: int) -> Tensor:
        if name == "count":
            return self.same.sum(dim, dtype=self.values.dtype)
        if name == "similarity":
            return torch.where(self.same, self.similarities, 0).sum(dim)
        return self.over(name).sum(dim).log() if self.bounded else self.over(name).logsumexp(dim)


class _Problem:
    def __init__(self, pairs: Pairs) -> None:
        self.a, self.b, self.a_norm, self.b_norm = sides(pairs)
        self.scale, self.bias, self.row_keys = pairs.scale, pairs.bias, pairs.row_keys
        self.column_keys = pairs.row_keys if pairs.columns is None else pairs.column_keys
        self.index = torch.arange(len(self.b), device=self.b.device)
        self.own = self.index if pairs.columns is None else pairs.own_column
        self.symmetric = pairs.columns is None and pairs.bias is None
        self.bounded = _bounded(pairs, self.a, self.b)

    def tiles(self) -> Iterator[_Tile]:
        for rows in _blocks(len(self.a)):
            for columns in _blocks(len(self.b)):
                if not self.symmetric or columns.start >= rows.start:
                    yield self._tile(rows, columns)

    def _tile(self, rows: slice, columns: slice) -> _Tile:
        similarities = (self.a[rows] @ self.b[columns].T).mul_(self.scale)
        logits = similarities if self.bias is None else similarities + self.bias[columns]
        values = logits.exp() if self.bounded else logits.clone()
        if self.row_keys is None:
            same = torch.zeros((), dtype=torch.bool, device=values.device).expand_as(values)
        else:
            same = self.row_keys[rows, None] == self.column_keys[columns]
        off_diagonal = self.symmetric and columns != rows
        if self.own is not None and not off_diagonal:
            itself = self.own[rows, None] == self.index[columns]
            values.masked_fill_(itself, 0 if self.bounded else -torch.inf)
            same = same & ~itself
        return _Tile(rows, columns, similarities, values, same, self.bounded, off_diagonal)


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


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, count)) for start in range(0, count, TILE))


@exact
def forward(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...], keep: bool) -> Terms:
    problem, (n, m, _) = _Problem(pairs), pairs.shape
    rows, columns = (_nothing(names, problem.a, count) for names, count in ((row_names, n), (column_names, m)))
    for tile in problem.tiles():
        _add(tile, rows[:, tile.rows], row_names, 1)
        if tile.mirrored:
            _add(tile, rows[:, tile.columns], row_names, 0)
        _add(tile, columns[:, tile.columns], column_names, 0)
    norms = problem.a.new_zeros(n + (0 if pairs.columns is None else m) if pairs.unit else 0)  # made anew in the backward
    return Terms(rows, columns, norms, problem.a.new_empty(0))


def _nothing(names: tuple[str, ...], like: Tensor, count: int) -> Tensor:
    """Quantities over no pair [len(names), count]."""
    totals = like.new_zeros(len(names), count)
    totals[: sum(name in LOG_SUMS for name in names)] = -torch.inf  # they are the first
    return totals


def _add(tile: _Tile, totals: Tensor, names: tuple[str, ...], dim: int) -> None:
    for name, total in zip(names, totals, strict=True):
        part = tile.quantity(name, dim)
        torch.logaddexp(total, part, out=total) if name in LOG_SUMS else total.add_(part)


def _incoming(side: Side, bounded: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Per quantity, its value q and a factor f: a pair's weight is f exp(t - q), bounded f exp(t), for a log-sum; f for ``similarity``."""
    prepared = {}
    for name, value, grad in zip(side.names, side.values, side.grads, strict=True):
        if name in LOG_SUMS:
            grad = torch.where(value == -torch.inf, 0, grad)  # a log-sum over no pair passes nothing
            value = torch.where(value == -torch.inf, 0, value)
            if bounded:  # a q below every bounded t is over pairs of other processes alone
                grad = grad * torch.exp(-value.clamp_min(-MOST_BOUNDED))
        prepared[name] = value, grad
    return prepared


def _softmax_weights(tile: _Tile, given: list[dict[str, tuple[Tensor, Tensor]]]) -> Tensor:
    """w_ij without the pairs' own similarities."""
    weights = torch.zeros_like(tile.values)
    for name in LOG_SUMS:
        terms = [of[name] for of in given if name in of]
        if terms and tile.bounded:
            weights.addcmul_(tile.over(name), sum(factor for _, factor in terms))
        elif terms:
            values = tile.over(name)
            for log_sum, factor in terms:
                weights.addcmul_(torch.exp(values - log_sum), factor)
    return weights


@exact
def backward(pairs: Pairs, rows: Side, columns: Side, norms: Tensor, kept: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    problem = _Problem(pairs)
    a, b, self_shape = problem.a, problem.b, pairs.columns is None
    da = torch.zeros_like(a) if needs[0] or needs[3] else None
    db = da if self_shape else torch.zeros_like(b) if needs[1] else None
    dbias = torch.zeros_like(pairs.bias) if needs[2] else None
    of_rows = _incoming(rows, problem.bounded)
    of_columns = of_rows if problem.symmetric else _incoming(columns, problem.bounded)
    for tile in problem.tiles():
        given = [{name: (value[tile.rows, None], factor[tile.rows, None]) for name, (value, factor) in of_rows.items()}]
        given += [{name: (value[tile.columns], factor[tile.columns]) for name, (value, factor) in of_columns.items()}]
        weights = _softmax_weights(tile, given)
        if dbias is not None:
            dbias[tile.columns] += weights.sum(0)
        if factors := [of["similarity"][1] for of in given if "similarity" in of]:
            weights += torch.where(tile.same, sum(factors), 0)
        if da is not None:
            da[tile.rows].addmm_(weights, b[tile.columns])
        if db is not None and (tile.mirrored or not problem.symmetric):
            db[tile.columns].addmm_(weights.T, a[tile.rows])
    dscale = (a * da).sum() * (0.5 if self_shape else 1) if needs[3] else None
    return Gradients(
        through_unit(da * pairs.scale, a, problem.a_norm).to(pairs.rows.dtype) if needs[0] else None,
        through_unit(db * pairs.scale, b, problem.b_norm).to(pairs.rows.dtype) if needs[1] else None,
        dbias,
        dscale,
    )
