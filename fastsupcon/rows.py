"""Rows brought to unit length, sums of rows by class, dots of rows with such sums and with gathered rows.

All are reproducible to the bit, have exact gradients, and do not wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _rows_torch
from ._opaque import opaque
from .backends._dtypes import sum_dtype
from .backends._extension import missing as extension_missing

if not extension_missing:
    from . import _rows_cpu


def _helpers(x: Tensor):
    """In C++ on the CPU, elsewhere plain PyTorch."""
    return _rows_torch if extension_missing or x.device.type != "cpu" else _rows_cpu


class _UnitRows(torch.autograd.Function):
    """u_i = x_i / |x_i|, dx_i = (g_i - u_i (u_i . g_i)) / |x_i|. A row of zeros stays zero and passes its gradient through."""

    @staticmethod
    def forward(ctx, x):
        unit, norm = _helpers(x).unit_rows(x)
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _helpers(grad).unit_rows_backward(*ctx.saved_tensors, grad)


def unit_rows(x: Tensor) -> Tensor:
    """x_i / |x_i| for rows x [N, D], computed in fp32 or better and returned in x's dtype; rows of zeros stay zero."""
    return _UnitRows.apply(x)


def number_labels(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, Tensor]:
    """Any int64 labels [N] -> ids [N] in [0, K), K, and share_i = 1 / (number of other rows with the row's label), 0 without one: [N].

    In C++ K is how many labels there are; elsewhere, and under torch.compile, it is the bound N, which need not be read back.
    """
    return (_rows_torch if torch.compiler.is_compiling() else _helpers(labels)).number_labels(labels, dtype)


def _sum_rows(x: Tensor, ids: Tensor, classes: int, weight: Tensor | None = None, start: Tensor | None = None, **hints) -> Tensor:
    return _helpers(x).sum_rows(x, ids, classes, weight, start, **hints)


def _fake_sum_rows(x: Tensor, ids: Tensor, classes: int, weight: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    return x.new_empty(classes, x.shape[1], dtype=sum_dtype(x.dtype))


_sum_rows_op = opaque(
    "sum_rows(Tensor x, Tensor ids, SymInt classes, Tensor? weight=None, Tensor? start=None) -> Tensor",
    _sum_rows,
    _fake_sum_rows,
)


def sum_rows(x: Tensor, ids: Tensor, classes: int, weight: Tensor | None = None) -> Tensor:
    """S_k = sum of w_j x_j over ids_j = k: x [N, D], ids int64 [N] in [0, classes) -> [classes, D] in the sum dtype.

    w [N] in the sum dtype, or None for 1. Has no gradient itself.
    """
    return _sum_rows_op(x, ids, classes, weight)


# The Functions below hand their rows through: what is computed from those afterwards sends its gradient back to where that of the dots is
# made, and both are added there in the same pass. Autograd's own addition is a pass more, and its threads then spin while ours begin.
#
# `exclusive` says that the rows handed through go nowhere but to operators that make their gradients anew, so that nobody else holds the
# gradient that comes back: in C++ it is then overwritten with the sum. Only a hook on these very nodes of the graph could see that.


def _hints(x: Tensor, exclusive: bool) -> dict[str, bool]:
    return {"into_start": True} if exclusive and _helpers(x) is not _rows_torch else {}


class _DotsWithOthers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, ids, classes, weight, exclusive):
        dots, sums = _helpers(z).dots_with_others(z, ids, classes, weight)
        ctx.save_for_backward(z, ids, weight, sums)
        ctx.hints = _hints(z, exclusive)
        return z.view_as(z), dots

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz, grad):
        return _helpers(grad).dots_with_others_backward(*ctx.saved_tensors, grad, dz, **ctx.hints), None, None, None, None


def dots_with_others(z: Tensor, ids: Tensor, classes: int, weight: Tensor, *, exclusive: bool = False) -> tuple[Tensor, Tensor]:
    """z again, and w_i z_i . (sum of the other rows z_j with ids_j = ids_i): z [N, D], ids int64 [N] in [0, classes), w [N] -> [N].

    w and the result have the sum dtype.
    """
    return _DotsWithOthers.apply(z, ids, classes, weight, exclusive)


class _RowDots(torch.autograd.Function):
    """t_i = z_i . T_k, k = ids_i; dz_i = h_i T_k, dT_k = sum over ids_i = k of h_i z_i."""

    @staticmethod
    def forward(ctx, z, table, ids, exclusive):
        ctx.save_for_backward(z, table, ids)
        ctx.hints = _hints(z, exclusive)
        return z.view_as(z), table.view_as(table), _helpers(z).row_dots(z, table, ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz, dtable, h):
        z, table, ids = ctx.saved_tensors
        dz = _helpers(z).row_dots_backward(z, table, ids, h, dz, **ctx.hints) if ctx.needs_input_grad[0] else None
        dtable = _sum_rows_op(z, ids, table.shape[0], h, dtable, **ctx.hints).to(table.dtype) if ctx.needs_input_grad[1] else None
        return dz, dtable, None, None


def row_dots(z: Tensor, table: Tensor, ids: Tensor, *, exclusive: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """z and T again, and z_i . T_k for k = ids_i: rows z [N, D], table T [K, D] of z's dtype, ids int64 [N] in [0, K) -> [N], sum dtype.

    Unlike indexing's, the table's gradient is reproducible on every device.
    """
    return _RowDots.apply(z, table, ids, exclusive)
