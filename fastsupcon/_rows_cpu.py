"""The C++ row helpers of csrc/cpu/rows.h as PyTorch operators, so that torch.compile sees no pointers: the contract of _rows_torch.py.

Each stands for four to eight passes of plain PyTorch, which at a few hundred rows cost more than the log-sum-exp itself.

``start`` is a gradient that a result is added to. With the hint ``into_start`` it becomes the result (of sum_rows where the dtypes are the
same; of the others they are): a tensor of N x D or C x D less, whose pages the system would have to find and clear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._opaque import opaque
from .backends._dtypes import sum_dtype
from .backends._extension import SCALARS
from .backends._extension import module as _C


def _rows(x: Tensor):
    return _C.Rows(SCALARS[x.dtype], x.data_ptr(), *x.shape)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    unit, norm = torch.empty_like(x), x.new_empty(len(x), dtype=sum_dtype(x.dtype))
    _C.cpu.unit_rows(_rows(x), unit.data_ptr(), norm.data_ptr(), torch.get_num_threads())
    return unit, norm


def _unit_rows_backward(unit: Tensor, norm: Tensor, grad: Tensor) -> Tensor:
    unit, grad = unit.contiguous(), grad.contiguous()
    dx = torch.empty_like(unit)
    _C.cpu.unit_rows_backward(_rows(unit), norm.data_ptr(), grad.data_ptr(), dx.data_ptr(), torch.get_num_threads())
    return dx


def number_labels(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, Tensor]:
    labels = labels.contiguous()
    ids, share = torch.empty_like(labels), labels.new_empty(len(labels), dtype=dtype)
    classes = _C.cpu.number_labels(SCALARS[dtype], labels.data_ptr(), len(labels), ids.data_ptr(), share.data_ptr())
    return ids, classes, share


def sum_rows(x: Tensor, ids: Tensor, classes: int, weight: Tensor | None = None, start: Tensor | None = None, into_start=False) -> Tensor:
    x, ids = x.contiguous(), ids.contiguous()
    weight, start = (None if t is None else t.contiguous() for t in (weight, start))
    sums = start if into_start and start.dtype == sum_dtype(x.dtype) else _sums(x, classes, x.shape[1])
    addresses = (ids.data_ptr(), _address(weight), classes, _address(start), sums.data_ptr())
    _C.cpu.sum_rows(_rows(x), *addresses, torch.get_num_threads())
    return sums


def _dots_with_others(z: Tensor, ids: Tensor, classes: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    z, ids = z.contiguous(), ids.contiguous()
    sums = sum_rows(z, ids, classes)
    return _row_dots(z, sums, ids, others=True).mul_(weight), sums


def _dots_with_others_backward(z, ids, weight, sums, grad, start, into_start=False) -> Tensor:
    grad = grad * weight
    return _row_dots_backward(z, sums, ids, grad, start, into_start, sum_rows(z, ids, len(sums), grad))


def _row_dots(z: Tensor, table: Tensor, ids: Tensor, others: bool = False) -> Tensor:
    z, table, ids = z.contiguous(), table.to(sum_dtype(z.dtype)).contiguous(), ids.contiguous()
    dots = table.new_empty(len(z))
    _C.cpu.row_dots(_rows(z), table.data_ptr(), len(table), ids.data_ptr(), others, dots.data_ptr(), torch.get_num_threads())
    return dots


def _row_dots_backward(z, table, ids, grad, start, into_start=False, grad_sums: Tensor | None = None) -> Tensor:
    z, table, ids = z.contiguous(), table.to(grad.dtype).contiguous(), ids.contiguous()
    grad, start = grad.contiguous(), start.contiguous()
    dz = start if into_start else torch.empty_like(z)
    addresses = (ids.data_ptr(), grad.data_ptr(), _address(grad_sums), start.data_ptr(), dz.data_ptr())
    _C.cpu.row_dots_backward(_rows(z), table.data_ptr(), len(table), *addresses, torch.get_num_threads())
    return dz


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sums(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=sum_dtype(x.dtype))


unit_rows = opaque("unit_rows(Tensor x) -> (Tensor, Tensor)", _unit_rows, lambda x: (_like(x), _sums(x, x.shape[0])), "CPU")
unit_rows_backward = opaque(
    "unit_rows_backward(Tensor unit, Tensor norm, Tensor grad) -> Tensor",
    _unit_rows_backward,
    lambda unit, *rest: _like(unit),
    "CPU",
)
dots_with_others = opaque(
    "dots_with_others(Tensor z, Tensor ids, SymInt classes, Tensor weight) -> (Tensor, Tensor)",
    _dots_with_others,
    lambda z, ids, classes, weight: (_sums(z, z.shape[0]), _sums(z, classes, z.shape[1])),
    "CPU",
)
dots_with_others_backward = opaque(
    "dots_with_others_backward(Tensor z, Tensor ids, Tensor weight, Tensor sums, Tensor grad, Tensor start) -> Tensor",
    _dots_with_others_backward,
    lambda z, *rest: _like(z),
    "CPU",
)
row_dots = opaque("row_dots(Tensor z, Tensor table, Tensor ids) -> Tensor", _row_dots, lambda z, *rest: _sums(z, z.shape[0]), "CPU")
row_dots_backward = opaque(
    "row_dots_backward(Tensor z, Tensor table, Tensor ids, Tensor grad, Tensor start) -> Tensor",
    _row_dots_backward,
    lambda z, *rest: _like(z),
    "CPU",
)
