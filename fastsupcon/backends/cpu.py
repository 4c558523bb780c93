"""The C++ kernels of csrc/cpu: symmetric tiles, vectorised, on all threads that ``torch.get_num_threads()`` gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import Gradients, Line, Pairs, Side, Terms
from ._dtypes import sum_dtype
from ._extension import incoming, mask, outgoing, problem, quantities
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
    """How many exponentials the forward can keep for the backward; 0 where they are too many (csrc/cpu/pairs.h)."""
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
    out, addresses = outgoing(pairs, needs)
    _C.cpu.backward(problem(pairs), incoming(rows), incoming(columns), _or_null(norms), _or_null(kept), addresses, torch.get_num_threads())
    return out


def loss(pairs: Pairs, names: tuple[str, ...], line: Line, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What is kept are the quantities [len(names), N] with the norms after them, in one array, and the exponentials."""
    n, m, depth = pairs.shape
    like, dtype, self_shape = pairs.rows, sum_dtype(pairs.rows.dtype), pairs.columns is None
    kept = like.new_empty(len(names) * n + pairs.norms_size, dtype=dtype)
    exponentials = like.new_empty(kept_size(n, m, depth, self_shape) if keep else 0, dtype=dtype)
    loss = like.new_empty(n if line.reduction == "none" else (), dtype=dtype)
    to = kept.data_ptr(), _or_null(exponentials), loss.data_ptr()
    _C.cpu.loss(problem(pairs), make_line(line), mask(names), *to, torch.get_num_threads())
    return loss, (kept, exponentials)


def loss_backward(
    pairs: Pairs, names: tuple[str, ...], line: Line, kept: Sequence[Tensor], grad: Tensor, needs: tuple[bool, bool, bool, bool]
) -> Gradients:
    all_kept, exponentials = kept
    out, addresses = outgoing(pairs, needs)
    given = all_kept.data_ptr(), _or_null(exponentials), grad.data_ptr()
    _C.cpu.loss_backward(problem(pairs), make_line(line), mask(names), *given, addresses, torch.get_num_threads())
    return out


def _or_null(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0
