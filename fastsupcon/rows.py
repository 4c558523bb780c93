"""Rows brought to unit length, and sums of rows by class: reproducible to the bit, with exact gradients, and no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends._dtypes import sum_dtype


class _UnitRows(torch.autograd.Function):
    """u_i = x_i / |x_i|, dx_i = (g_i - u_i (u_i . g_i)) / |x_i|. A row of zeros stays zero and passes its gradient through."""

    @staticmethod
    def forward(ctx, x):
        wide = x.to(sum_dtype(x.dtype))
        largest = wide.abs().amax(1, keepdim=True)  # divided out first: squares of rows near 1e20 or 1e-23 leave fp32's range
        largest = torch.where(largest < torch.finfo(wide.dtype).tiny, 1, largest)
        unit = wide / largest
        norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        norm = torch.where(norm == 0, 1, norm)
        unit /= norm
        ctx.save_for_backward(unit.to(x.dtype), norm.mul_(largest))
        return unit.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        unit, norm = ctx.saved_tensors
        wide, wide_grad = unit.to(norm.dtype), grad.to(norm.dtype)
        return torch.addcmul(wide_grad, wide, (wide * wide_grad).sum(1, keepdim=True), value=-1).div_(norm).to(grad.dtype)


def unit_rows(x: Tensor) -> Tensor:
    """x_i / |x_i| for rows x [N, D], computed in fp32 or better and returned in x's dtype; rows of zeros stay zero."""
    return _UnitRows.apply(x)


_CHUNK = 256  # rows one GPU thread adds in sequence before its sum becomes a partial one


def _sum_rows(x: Tensor, ids: Tensor, classes: int) -> Tensor:
    x = x.to(sum_dtype(x.dtype))
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


_library = torch.library.Library("fastsupcon", "FRAGMENT")
_library.define("sum_rows(Tensor x, Tensor ids, SymInt classes) -> Tensor")
_library.impl("sum_rows", _sum_rows, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastsupcon::sum_rows", lambda x, ids, classes: x.new_empty(classes, x.shape[1], dtype=sum_dtype(x.dtype)), lib=_library
)


def sum_rows(x: Tensor, ids: Tensor, classes: int) -> Tensor:
    """C_y = sum of x_j over ids_j = y: x [N, D], ids int64 [N] in [0, classes) -> [classes, D] in the sum dtype. Has no gradient itself."""
    return torch.ops.fastsupcon.sum_rows(x, ids, classes)


class _GatherRows(torch.autograd.Function):
    """x[ids]; its gradient sums rows by id, so unlike indexing's it is reproducible on every device."""

    @staticmethod
    def forward(ctx, x, ids):
        ctx.save_for_backward(ids)
        ctx.classes = x.shape[0]
        return x.index_select(0, ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return sum_rows(grad, ctx.saved_tensors[0], ctx.classes).to(grad.dtype), None


def gather_rows(x: Tensor, ids: Tensor) -> Tensor:
    """x[ids] for rows x [C, D] and ids int64 [N] -> [N, D]."""
    return _GatherRows.apply(x, ids)
