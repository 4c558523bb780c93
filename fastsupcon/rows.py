"""Rows as the operator takes them inside, in plain PyTorch, for what stands beside it; and numbers as it takes them."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from .backends import sum_dtype
from .backends.reference import unit_rows


def wide_rows(x: Tensor, unit: bool) -> Tensor:
    """Rows [N, D] in the sum dtype; with ``unit`` x_i / |x_i|, where a row of zeros stays zero."""
    x = x.to(sum_dtype(x.dtype))
    return unit_rows(x)[0] if unit else x


def wide_number(value: float | Tensor, rows: Tensor) -> float | Tensor:
    """A scale, a temperature or a bias beside ``rows``: a number, or what has one element as a 0-d tensor in the sum dtype.

    Under torch.compile always a tensor. A number that a schedule changes would be compiled anew for each value; and where it stands both
    at a tensor and in an operator's argument, the code that Inductor of torch 2.13 makes keeps an old value in the latter.
    """
    if isinstance(value, numbers.Real):
        if not torch.compiler.is_compiling():
            return float(value)
        return rows.new_ones((), dtype=sum_dtype(rows.dtype)) * value
    return torch.as_tensor(value).to(rows.device, sum_dtype(rows.dtype)).reshape(())
