"""The C++ kernels of csrc/cpu: symmetric tiles, vectorised, on all threads that ``torch.get_num_threads()`` gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dtypes import sum_dtype
from ._extension import make_problem
from ._extension import missing as extension_missing
from ._extension import module as _C

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    if extension_missing:
        return extension_missing
    if device.type != "cpu":
        return f"runs on cpu tensors, not {device.type}"
    return None if dtype in _DTYPES else f"dtype {dtype} is none of {_DTYPES}"


def self_forward(z: Tensor, scale: float, unit_rows: bool) -> Tensor:
    lse = z.new_empty(len(z), dtype=sum_dtype(z.dtype))
    _C.cpu.self_forward(make_problem(z, z, scale=scale, unit_rows=unit_rows), lse.data_ptr(), torch.get_num_threads())
    return lse


def self_backward(z: Tensor, lse: Tensor, grad: Tensor, scale: float, unit_rows: bool) -> Tensor:
    dz = torch.empty_like(z)
    problem = make_problem(z, z, scale=scale, unit_rows=unit_rows)
    _C.cpu.self_backward(problem, lse.data_ptr(), grad.data_ptr(), dz.data_ptr(), torch.get_num_threads())
    return dz


def cross_forward(a, b, bias, skip, row_labels, column_labels, scale) -> Tensor:
    lse = a.new_empty(len(a), dtype=sum_dtype(a.dtype))
    _C.cpu.cross_forward(make_problem(a, b, bias, skip, row_labels, column_labels, scale), lse.data_ptr(), torch.get_num_threads())
    return lse


def cross_backward(a, b, bias, skip, row_labels, column_labels, lse, grad, scale, needs):
    da = torch.empty_like(a) if needs[0] else None
    db = torch.empty_like(b) if needs[1] else None
    dbias = torch.empty_like(bias) if needs[2] else None
    outputs = (0 if out is None else out.data_ptr() for out in (da, db, dbias))
    problem = make_problem(a, b, bias, skip, row_labels, column_labels, scale)
    _C.cpu.cross_backward(problem, lse.data_ptr(), grad.data_ptr(), *outputs, torch.get_num_threads())
    return da, db, dbias
