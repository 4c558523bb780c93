"""The primitive as PyTorch operators: ``torch.library`` ops that run a backend, and autograd Functions around them.

    self_lse:   lse_i = log sum_{j != i} exp(z_i . z_j * scale)
    cross_lse:  lse_i = log sum_{j allowed for i} exp(a_i . b_j * scale + bias_j)

The ops are opaque to ``torch.compile`` and have no autograd of their own: a Function around them costs less per call than
``torch.library.register_autograd``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._opaque import opaque
from .backends import BACKENDS, select
from .backends._dtypes import sum_dtype


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _backend(name: str, rows: Tensor):
    """Chosen as the op runs, from the rows' true shape, so that torch.compile may keep shapes symbolic."""
    return BACKENDS[select(name, rows.device, rows.dtype, rows.shape[1])]


def _self_lse(z, scale, unit_rows, backend):
    return _backend(backend, z).self_forward(z.contiguous(), scale, unit_rows)


def _self_lse_backward(z, lse, grad, scale, unit_rows, backend):
    return _backend(backend, z).self_backward(*_contiguous(z, lse, grad), scale, unit_rows)


def _cross_lse(a, b, bias, skip, row_labels, column_labels, scale, backend):
    return _backend(backend, a).cross_forward(*_contiguous(a, b, bias, skip, row_labels, column_labels), scale)


def _cross_lse_backward(a, b, bias, skip, row_labels, column_labels, lse, grad, scale, needs, backend):
    tensors = _contiguous(a, b, bias, skip, row_labels, column_labels, lse, grad)
    gradients = _backend(backend, a).cross_backward(*tensors, scale, tuple(needs))
    # an op cannot return None: an output nobody asked for is an empty tensor
    return tuple(a.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_lse(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=sum_dtype(rows.dtype))


def _fake_cross_lse_backward(a, b, bias, skip, row_labels, column_labels, lse, grad, scale, needs, backend):
    outputs = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else a.new_empty(0)
        for tensor, need in zip((a, b, bias), needs, strict=True)
    )
    return tuple(outputs)


_CROSS = "Tensor a, Tensor b, Tensor? bias, Tensor? skip, Tensor? row_labels, Tensor? column_labels"

_self_lse_op = opaque(
    "self_lse(Tensor z, float scale, bool unit_rows, str backend) -> Tensor",
    _self_lse,
    lambda z, scale, unit_rows, backend: _fake_lse(z),
)
_self_lse_backward_op = opaque(
    "self_lse_backward(Tensor z, Tensor lse, Tensor grad, float scale, bool unit_rows, str backend) -> Tensor",
    _self_lse_backward,
    lambda z, *rest: torch.empty_like(z, memory_format=torch.contiguous_format),
)
_cross_lse_op = opaque(f"cross_lse({_CROSS}, float scale, str backend) -> Tensor", _cross_lse, lambda a, *rest: _fake_lse(a))
_cross_lse_backward_op = opaque(
    f"cross_lse_backward({_CROSS}, Tensor lse, Tensor grad, float scale, bool[3] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _cross_lse_backward,
    _fake_cross_lse_backward,
)


class _SelfLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, scale, unit_rows, backend):
        lse = _self_lse_op(z, scale, unit_rows, backend)
        ctx.save_for_backward(z, lse)
        ctx.options = (scale, unit_rows, backend)
        return lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _self_lse_backward_op(*ctx.saved_tensors, grad, *ctx.options), None, None, None


class _CrossLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, bias, skip, row_labels, column_labels, scale, backend):
        lse = _cross_lse_op(a, b, bias, skip, row_labels, column_labels, scale, backend)
        ctx.save_for_backward(a, b, bias, skip, row_labels, column_labels, lse)
        ctx.scale, ctx.backend = scale, backend
        return lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:3]
        gradients = _cross_lse_backward_op(*ctx.saved_tensors, grad, ctx.scale, needs, ctx.backend)
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None, None, None, None


def self_lse(z: Tensor, scale: float, unit_rows: bool, backend: str) -> Tensor:
    """log sum_{j != i} exp(z_i . z_j * scale): [N, D] -> [N] in the sum dtype."""
    return _SelfLse.apply(z, scale, unit_rows, backend)


def cross_lse(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    row_labels: Tensor | None,
    column_labels: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    """log sum_{j allowed} exp(a_i . b_j * scale + bias_j): [N, D], [M, D] -> [N] in the sum dtype."""
    return _CrossLse.apply(a, b, bias, skip, row_labels, column_labels, scale, backend)
