"""The compiled extension, if it was built, and how a problem is handed to it (csrc/lse_problem.h)."""

from __future__ import annotations

import importlib
import warnings

import torch
from torch import Tensor

try:
    module = importlib.import_module("fastsupcon._C")
    missing = None
except ImportError as error:
    module = None
    missing = f"the compiled extension cannot be imported ({error})"
    warnings.warn(f"fastsupcon runs without its C++ and CUDA kernels: {missing}", RuntimeWarning, stacklevel=2)


SCALARS = (
    {}
    if missing
    else {
        torch.float32: module.Scalar.f32,
        torch.float64: module.Scalar.f64,
        torch.float16: module.Scalar.f16,
        torch.bfloat16: module.Scalar.bf16,
    }
)


def make_problem(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    row_labels: Tensor | None = None,
    column_labels: Tensor | None = None,
    scale: float = 1.0,
    unit_rows: bool = False,
):
    """Addresses and sizes of the tensors, which the caller keeps alive while a kernel runs."""

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return module.LseProblem(
        scalar=SCALARS[a.dtype],
        rows=len(a),
        columns=len(b),
        depth=a.shape[1],
        a=address(a),
        b=address(b),
        bias=address(bias),
        skip=address(skip),
        row_labels=address(row_labels),
        column_labels=address(column_labels),
        scale=scale,
        unit_rows=unit_rows,
    )
