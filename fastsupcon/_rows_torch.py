"""Row helpers in plain PyTorch, for any device; torch.compile fuses them. _rows_cpu.py has the same in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends._dtypes import sum_dtype


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_i / |x_i| [N, D] in x's dtype, and |x_i| [N] in the sum dtype. A row of zeros stays zero, with norm 1."""
    wide = x.to(sum_dtype(x.dtype))
    largest = wide.abs().amax(1, keepdim=True)  # divided out first: squares of rows near 1e20 or 1e-23 leave fp32's range
    largest += largest < torch.finfo(wide.dtype).tiny
    unit = wide / largest
    norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min_(1)  # below 1 only where the row had no normal number
    unit /= norm
    return unit.to(x.dtype), norm.mul_(largest).squeeze(1)


def unit_rows_backward(unit: Tensor, norm: Tensor, grad: Tensor) -> Tensor:
    """dx_i = (g_i - u_i (u_i . g_i)) / |x_i|."""
    wide, wide_grad = unit.to(norm.dtype), grad.to(norm.dtype)
    along = (wide * wide_grad).sum(1, keepdim=True)  # autocast would round a vecdot's operands
    return torch.addcmul(wide_grad, wide, along, value=-1).div_(norm[:, None]).to(unit.dtype)


def number_labels(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, Tensor]:
    """Any int64 labels [N] -> ids [N] numbered from 0, a bound on how many there are, and share [N] in ``dtype``.

    share_i = 1 / (number of other rows with the row's label), 0 where there is none. The bound is N: to know the number it would have to be
    read back.
    """
    ordered, order = torch.sort(labels)
    rank = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).cumsum(0)])
    ids = torch.empty_like(rank).scatter_(0, order, rank)
    sizes = torch.zeros_like(ids).scatter_add_(0, ids, torch.ones_like(ids))
    share = torch.where(sizes > 1, (sizes - 1).to(dtype).reciprocal(), 0)
    return ids, labels.shape[0], share.index_select(0, ids)


def dots_with_others(z: Tensor, ids: Tensor, classes: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """w_i z_i . (S_k - z_i) for k = ids_i, [N], and S_k = sum over ids_j = k of z_j, [classes, D], both in the sum dtype."""
    sums = torch.ops.fastsupcon.sum_rows(z, ids, classes)
    return sums.index_select(0, ids).sub_(z).mul_(z).sum(1).mul_(weight), sums


def dots_with_others_backward(z: Tensor, ids: Tensor, weight: Tensor, sums: Tensor, grad: Tensor, start: Tensor) -> Tensor:
    """dz_i = start_i + h_i (S_k - 2 z_i) + sum over ids_j = k of h_j z_j, where h = grad w."""
    h = (grad * weight)[:, None]
    weighted = torch.ops.fastsupcon.sum_rows(z * h, ids, sums.shape[0])
    return sums.index_select(0, ids).sub_(z, alpha=2).mul_(h).add_(weighted.index_select(0, ids)).add_(start).to(z.dtype)


def row_dots(z: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """z_i . T_k for k = ids_i: [N] in the sum dtype."""
    return (table.index_select(0, ids).to(sum_dtype(z.dtype)) * z).sum(1)


def row_dots_backward(z: Tensor, table: Tensor, ids: Tensor, grad: Tensor, start: Tensor) -> Tensor:
    """dz_i = start_i + g_i T_k."""
    return torch.addcmul(start.to(grad.dtype), table.index_select(0, ids).to(grad.dtype), grad[:, None]).to(z.dtype)


_CHUNK = 256  # rows one GPU thread adds in sequence before its sum becomes a partial one


def sum_rows(x: Tensor, ids: Tensor, classes: int, weight: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """start_k + sum over ids_i = k of weight_i x_i: x [N, D], ids int64 [N] in [0, classes), weight [N] -> [classes, D], sum dtype."""
    sums = _sum_rows(x.to(sum_dtype(x.dtype)), ids, classes, weight)
    return sums if start is None else sums.add_(start)


def _sum_rows(x: Tensor, ids: Tensor, classes: int, weight: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight[:, None]
    if x.device.type != "cuda":
        return x.new_zeros(classes, x.shape[1]).index_add_(0, ids, x)
    # index_add_ adds in the atomics' order there. So: rows sorted by class, runs of at most _CHUNK summed, then the runs of each class.
    sorted_ids, order = torch.sort(ids, stable=True)
    counts = ids.new_zeros(classes).scatter_add_(0, ids, torch.ones_like(ids))
    place = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[sorted_ids]  # of a row within its class
    run = (place % _CHUNK == 0).cumsum(0) - 1
    runs = min(len(ids), classes + len(ids) // _CHUNK)  # bound on how many there are; the rest have length 0
    run_lengths = ids.new_zeros(runs).scatter_add_(0, run, torch.ones_like(run))
    partial = torch.segment_reduce(x[order], "sum", lengths=run_lengths, unsafe=True, initial=0)
    return torch.segment_reduce(partial, "sum", lengths=(counts + _CHUNK - 1) // _CHUNK, unsafe=True, initial=0)
