"""Plain PyTorch in tiles of 512 x 512 logits: any device, any floating dtype, O(N D) memory.

Self-similarity is symmetric, so only tiles on and above the diagonal are computed. Where a fixed shift c is safe, one exp serves a row and
a column: with E_ij = exp(s_ij - c) and a_i = g_i exp(c - lse_i), dz_i = scale * sum_j E_ij (a_i + a_j) z_j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._dtypes import exact, fixed_shift_is_safe, sum_dtype

TILE = 512  # rows and columns; 1 MiB of fp32 logits stays in a core's L2


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    return None if dtype.is_floating_point else f"dtype {dtype} is not floating point"


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, count)) for start in range(0, count, TILE))


def _triangle(z: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Row slice I, column slice J >= I, and both blocks of z in the sum dtype."""
    dtype = sum_dtype(z.dtype)
    for rows in _blocks(len(z)):
        z_rows = z[rows].to(dtype)
        for columns in _blocks(len(z)):
            if columns.start >= rows.start:
                yield rows, columns, z_rows, z_rows if columns == rows else z[columns].to(dtype)


def _self_logits(z_rows: Tensor, z_columns: Tensor, scale: float) -> Tensor:
    """One tile of s_ij; the self pairs of a diagonal tile are -inf."""
    logits = torch.mm(z_rows, z_columns.T).mul_(scale)
    return logits.fill_diagonal_(-math.inf) if z_rows is z_columns else logits


def _fixed_shift(z: Tensor, scale: float, unit_rows: bool) -> float | None:
    """c >= every s_ij such that exp(s_ij - c) cannot underflow, or None. A norm that is not known is not read back from a GPU."""
    if not unit_rows and z.device.type != "cpu":
        return None
    squared_norm = 1.0 if unit_rows else float(torch.linalg.vector_norm(z, dim=1, dtype=sum_dtype(z.dtype)).max()) ** 2
    shift = abs(scale) * squared_norm
    return shift if fixed_shift_is_safe(shift) else None


@exact
def self_forward(z: Tensor, scale: float, unit_rows: bool) -> Tensor:
    shift = _fixed_shift(z, scale, unit_rows)
    dtype = sum_dtype(z.dtype)
    if shift is None:
        lse = torch.full((len(z),), -math.inf, device=z.device, dtype=dtype)
        for rows, columns, z_rows, z_columns in _triangle(z):
            logits = _self_logits(z_rows, z_columns, scale)
            lse[rows] = torch.logaddexp(lse[rows], logits.logsumexp(1))
            if rows != columns:
                lse[columns] = torch.logaddexp(lse[columns], logits.logsumexp(0))
        return lse
    total = torch.zeros(len(z), device=z.device, dtype=dtype)
    for rows, columns, z_rows, z_columns in _triangle(z):
        exps = _self_logits(z_rows, z_columns, scale).sub_(shift).exp_()
        total[rows] += exps.sum(1)
        if rows != columns:
            total[columns] += exps.sum(0)
    return total.log_().add_(shift)


@exact
def self_backward(z: Tensor, lse: Tensor, grad: Tensor, scale: float, unit_rows: bool) -> Tensor:
    shift = _fixed_shift(z, scale, unit_rows)
    dz = torch.zeros(z.shape, device=z.device, dtype=sum_dtype(z.dtype))
    if shift is not None:  # a_i; 0 for a row without any other, whose lse is -inf
        a = torch.where(lse == -math.inf, 0, grad * torch.exp(shift - lse))
    for rows, columns, z_rows, z_columns in _triangle(z):
        logits = _self_logits(z_rows, z_columns, scale)
        if shift is None:
            weights = _weights(logits, lse[rows, None], grad[rows, None]) + _weights(logits, lse[columns], grad[columns])
        else:
            weights = logits.sub_(shift).exp_().mul_(a[rows, None] + a[columns])
        dz[rows].addmm_(weights, z_columns)
        if rows != columns:
            dz[columns].addmm_(weights.T, z_rows)
    return dz.mul_(scale).to(z.dtype)


def _weights(logits: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """g P = g exp(s - lse), and 0 where the pair is not allowed."""
    return torch.where(logits == -math.inf, 0, torch.exp(logits - lse) * grad)


def _cross_tiles(a, b, bias, skip, row_labels, column_labels, scale) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Row and column slices, both blocks in the sum dtype, and their tile of s_ij with -inf where a pair is not allowed."""
    dtype = sum_dtype(a.dtype)
    for rows in _blocks(len(a)):
        a_rows = a[rows].to(dtype)
        for columns in _blocks(len(b)):
            b_columns = b[columns].to(dtype)
            logits = torch.mm(a_rows, b_columns.T).mul_(scale)
            if bias is not None:
                logits += bias[columns]
            if skip is not None:
                logits.masked_fill_(skip[rows, None] == torch.arange(columns.start, columns.stop, device=b.device), -math.inf)
            if row_labels is not None:
                logits.masked_fill_(row_labels[rows, None] == column_labels[columns], -math.inf)
            yield rows, columns, a_rows, b_columns, logits


@exact
def cross_forward(a, b, bias, skip, row_labels, column_labels, scale) -> Tensor:
    lse = torch.full((len(a),), -math.inf, device=a.device, dtype=sum_dtype(a.dtype))
    for rows, _, _, _, logits in _cross_tiles(a, b, bias, skip, row_labels, column_labels, scale):
        lse[rows] = torch.logaddexp(lse[rows], logits.logsumexp(1))
    return lse


@exact
def cross_backward(a, b, bias, skip, row_labels, column_labels, lse, grad, scale, needs):
    dtype = sum_dtype(a.dtype)
    da = torch.zeros(a.shape, device=a.device, dtype=dtype) if needs[0] else None
    db = torch.zeros(b.shape, device=b.device, dtype=dtype) if needs[1] else None
    dbias = torch.zeros_like(bias) if needs[2] else None
    for rows, columns, a_rows, b_columns, logits in _cross_tiles(a, b, bias, skip, row_labels, column_labels, scale):
        weights = _weights(logits, lse[rows, None], grad[rows, None])
        if da is not None:
            da[rows].addmm_(weights, b_columns)
        if db is not None:
            db[columns].addmm_(weights.T, a_rows)
        if dbias is not None:
            dbias[columns] += weights.sum(0)
    return (
        None if da is None else da.mul_(scale).to(a.dtype),
        None if db is None else db.mul_(scale).to(b.dtype),
        dbias,
    )
