"""The compiled extension, if it was built, and how a problem is handed to it (csrc/problem.h)."""

from __future__ import annotations

import functools
import math
import platform
import warnings
from importlib.metadata import distributions
from typing import Any

import torch
from torch import Tensor

from ..problem import QUANTITIES, Gradients, Line, Pairs, Side

__all__ = ["SCALARS", "address", "incoming", "line", "mask", "missing", "module", "outgoing", "problem", "quantities"]

_PACKAGE = __name__.removesuffix(".backends._extension")


def _left_out() -> bool:
    """Whether this is a wheel for every system, as FASTSUPCON_NO_EXTENSION=1 makes one, or a copy of another name (docs/kernel_hub.py)."""
    wheels = (found.read_text("WHEEL") or "" for found in distributions(name="fastsupcon"))
    return _PACKAGE != "fastsupcon" or any("Root-Is-Purelib: true" in wheel for wheel in wheels)


missing: str | None = None
try:
    from .. import _C as module
except ImportError as error:
    module = None  # type: ignore[assignment]  # nobody asks it for anything: a backend that needs it says that it is missing
    absent = error.name == _PACKAGE  # which lacks the name
    if absent and _left_out():
        missing = "this installation is without the compiled extension (FASTSUPCON_NO_EXTENSION, or a wheel for every system)"
    else:
        missing = f"the compiled extension cannot be imported ({error})"
        if absent:
            missing = f"no compiled extension for Python {platform.python_version()} lies beside the package: pip install builds it"
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


def problem(pairs: Pairs) -> module.Problem:
    """Addresses and sizes of the tensors, which the caller keeps alive while a kernel runs."""
    rows, columns, scale, unit, bias, row_keys, column_keys, own_column = pairs
    n, m, depth = pairs.shape
    number, scale_address = (0.0, scale.data_ptr()) if isinstance(scale, Tensor) else (scale, 0)
    keys = address(row_keys), address(column_keys), address(own_column)
    return module.Problem(
        SCALARS[rows.dtype], n, m, depth, rows.data_ptr(), address(columns), address(bias), *keys, number, scale_address, unit
    )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def quantities(names: tuple[str, ...], values: Tensor) -> module.Quantities:
    """Where each of the quantities stands in ``values`` [len(names), N]."""
    return module.Quantities(values.data_ptr(), values.shape[1] * values.element_size(), mask(names))


@functools.cache
def mask(names: tuple[str, ...]) -> int:
    return sum(1 << QUANTITIES.index(name) for name in names)


def incoming(side: Side) -> module.Incoming:
    return module.Incoming(quantities(side.names, side.values), quantities(side.names, side.grads))


def outgoing(pairs: Pairs, needs: tuple[bool, bool, bool, bool]) -> tuple[Gradients, module.Outgoing]:
    """Gradients of what needs them, yet without values, and where they stand."""
    rows, columns, bias, scale = needs
    of: Any = pairs  # what a gradient is needed of is a tensor
    out = Gradients(
        torch.empty_like(of.rows) if rows else None,
        torch.empty_like(of.columns) if columns else None,
        torch.empty_like(of.bias) if bias else None,
        torch.empty_like(of.scale) if scale else None,
    )
    return out, module.Outgoing(address(out.rows), address(out.columns), address(out.bias), address(out.scale))


@functools.lru_cache(maxsize=256)
def line(line: Line) -> module.Line:
    """Not for a line whose factor is a tensor."""
    reduction = getattr(module.Line.Reduction, line.reduction)
    return module.Line(*line[:6], math.nan if line.lone == "nan" else 0.0, line.lone == "skip", reduction)
