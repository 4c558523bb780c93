"""Rows brought to unit length in plain PyTorch: for what stands beside the operator, which does it inside."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import sum_dtype
from .backends.reference import unit_rows as _unit_rows


def unit_rows(x: Tensor) -> Tensor:
    """x_i / |x_i| for rows x [N, D], in the sum dtype. A row of zeros stays zero."""
    return _unit_rows(x.to(sum_dtype(x.dtype)))[0]
