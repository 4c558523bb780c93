"""The C++ kernels of csrc/cpu: symmetric tiles, vectorised, on all threads that ``torch.get_num_threads()`` gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import Gradients, Line, Pairs, Side, Terms
from ._dtypes import sum_dtype
from ._extension import SCALARS, address, incoming, problem, quantities
from ._extension import line as make_line
from ._extension import missing as extension_missing
from ._extension import module as _C

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    if extension_missing:
        return extension_missing
    if device.type != "cpu":
        return f"runs on cpu tensors, not {device.type}"
    return None if dtype in _DTYPES else f"dtype {dtype} is none of {_DTYPES}"


def kept_size(rows: int, columns: int, depth: int, self_shape: bool) -> int:
    """How many exponentials the forward can keep for the backward; 0 where they would be more numbers than rows and columns have."""
    return 0 if extension_missing else _C.cpu.kept_size(rows, columns, depth, self_shape)


def forward(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...], keep: bool) -> Terms:
    n, m, depth = pairs.shape
    dtype, self_shape = sum_dtype(pairs.rows.dtype), pairs.columns is None

    def empty(*shape: int) -> Tensor:
        return pairs.rows.new_empty(shape, dtype=dtype)  # torch.empty would follow a default device

    norms = empty(n if self_shape else n + m) if pairs.unit else pairs.rows.new_zeros(1, dtype=dtype)
    kept = empty(kept_size(n, m, depth, self_shape) if keep else 0)
    terms = Terms(empty(len(row_names), n), empty(len(column_names), m), norms, kept)
    of_rows, of_columns = quantities(row_names, terms.rows), quantities(column_names, terms.columns)
    _C.cpu.forward(problem(pairs), of_rows, of_columns, _or_null(norms), _or_null(kept), torch.get_num_threads())
    return terms


def backward(pairs: Pairs, rows: Side, columns: Side, norms: Tensor, kept: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    wanted: tuple[Any, ...] = (pairs.rows, pairs.columns, pairs.bias, pairs.scale)  # what a gradient is needed of is a tensor
    out = Gradients(*(torch.empty_like(x) if need else None for x, need in zip(wanted, needs, strict=True)))
    addresses = _C.Outgoing(*(address(x) for x in out))
    _C.cpu.backward(problem(pairs), incoming(rows), incoming(columns), _or_null(norms), _or_null(kept), addresses, torch.get_num_threads())
    return out


def line(names: tuple[str, ...], values: Tensor, line: Line) -> Tensor:
    rows = values.shape[1]
    loss = values.new_empty(rows if line.reduction == "none" else ())
    _C.cpu.line(make_line(line), SCALARS[values.dtype], rows, quantities(names, values), loss.data_ptr())
    return loss


def line_backward(names: tuple[str, ...], values: Tensor, grad: Tensor, line: Line) -> Tensor:
    grads, grad = torch.empty_like(values), grad.contiguous()
    of_values, of_grads = quantities(names, values), quantities(names, grads)
    _C.cpu.line_backward(make_line(line), SCALARS[values.dtype], values.shape[1], of_values, grad.data_ptr(), of_grads)
    return grads


def _or_null(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0
