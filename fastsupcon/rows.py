"""Rows as the operator takes them inside, in plain PyTorch, for what stands beside it; and numbers as it takes them."""

from __future__ import annotations

from torch import Tensor

from .backends import sum_dtype
from .backends.reference import unit_rows


def wide_rows(x: Tensor, unit: bool) -> Tensor:
    """Rows [N, D] in the sum dtype; with ``unit`` x_i / |x_i|, where a row of zeros stays zero."""
    x = x.to(sum_dtype(x.dtype))
    return unit_rows(x)[0] if unit else x


def wide_number(value: float | Tensor, rows: Tensor) -> float | Tensor:
    """A scale, a temperature or a bias beside ``rows``: a number, or a tensor of one element as a 0-d one in the sum dtype."""
    return value.to(rows.device, sum_dtype(rows.dtype)).reshape(()) if isinstance(value, Tensor) else float(value)
