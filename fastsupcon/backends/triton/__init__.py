"""The Triton kernels on NVIDIA, AMD and Intel GPUs: which of them serve a call, on which grids. They are in the files beside this one.

    loss            rows_kernel, forward_kernel, loss_kernel
    loss_backward   gradient_kernel; finish_kernel if there are parts to sum
    forward         rows_kernel if unit or with keys; forward_kernel; join_kernel if a side's stream has splits
    backward        weights_kernel, gradient_kernel; finish_kernel if there are parts to sum

So a step of a loss is four or five launches, of other terms three to six, and no operator of torch's launches beside them. They are planned
once for a form of problems (launch.py). Nothing here waits for the device or looks at values in it, and every sum has a fixed order.
Triton is imported by the first call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem import Gradients, Line, Pairs, Side, Terms
from .._dtypes import is_bounded, tf32_allowed
from .launch import Plan
from .plans import Form, Gpu, LineForm, backward_plan, form_of, forward_plan, line_numbers, loss_backward_plan, loss_plan
from .table import family

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_DEPTH = 1024


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreter_unusable() -> str | None:
    """Triton 3.6 makes a loop's bound an int from an array of one element, which NumPy 2.4 refuses."""
    import numpy
    import triton

    def release(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    if release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} needs NumPy < 2.4, this is {numpy.__version__}"
    return None


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    if not _installed():
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on cpu tensors only in Triton's interpreter (TRITON_INTERPRET=1 before Python starts; slow, for tests)"
    if device.type == "cpu" and (reason := _interpreter_unusable()) is not None:
        return reason
    if device.type not in ("cuda", "xpu", "cpu"):
        return f"runs on cuda (NVIDIA, AMD) and xpu tensors, not {device.type}"
    if device.type != "cpu" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler (CC, gcc or clang) to build its launchers"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if dtype not in _DTYPES:
        return f"dtype {dtype} is none of {_DTYPES}"
    return None if depth <= _MAX_DEPTH else f"rows of dimension {depth} are longer than {_MAX_DEPTH}"


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    if device.type == "cpu":
        return Gpu("interpreter", 1, ("interpreter", "interpreter"))
    from triton.runtime import driver

    target = driver.active.get_current_target()
    units = driver.active.utils.get_device_properties(device.index)["multiprocessor_count"] if device.type == "cuda" else 64
    kind = family(target.backend, target.arch)
    # three TF32 products of the operands' upper and lower halves are as accurate as fp32, and several times faster than fp32's own units
    full, tf32 = ("ieee", "ieee") if target.backend != "cuda" else ("tf32x3", "tf32")
    return Gpu(kind, units, (full, tf32))


def _precision(gpu: Gpu, dtype: torch.dtype) -> str:
    """Of products; half types have only one, "ieee"."""
    return gpu.precision[tf32_allowed()] if dtype == torch.float32 or gpu.family == "interpreter" else "ieee"


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type == "cpu" or device.index == torch.get_device_module(device).current_device():
        return contextlib.nullcontext()
    current: contextlib.AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return current


def _form(pairs: Pairs) -> Form:
    rows, columns, scale, unit, bias, row_keys, _, own = pairs
    number = None if isinstance(scale, Tensor) else scale
    gpu = _gpu(rows.device)
    bounded = unit and bias is None and (number is None or is_bounded(abs(number)))
    return form_of(
        gpu, rows.device, rows.dtype, pairs.shape, columns is not None, unit, number is None, bounded, bias is not None,
        row_keys is not None, own is not None, _precision(gpu, rows.dtype),
    )  # fmt: skip


def forward(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...], keep: bool) -> Terms:
    n, m, _ = pairs.shape
    like, f32 = pairs.rows, torch.float32
    with _on(like.device):
        plan = forward_plan(_form(pairs), row_names, column_names)
        rows, columns = like.new_empty((len(row_names), n), dtype=f32), like.new_empty((len(column_names), m), dtype=f32)
        norms = like.new_empty(n if pairs.columns is None else n + m, dtype=f32) if pairs.unit else like.new_zeros(1, dtype=f32)
        outputs = {"row_values": rows, "column_values": columns, "norms": norms, "scratch": plan.scratch.empty(like)}
        plan.run({**pairs._asdict(), **outputs}, like.device)
    return Terms(rows, columns, norms, like.new_empty(0, dtype=f32))


def backward(pairs: Pairs, rows: Side, columns: Side, norms: Tensor, kept: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    values = {
        "row_values": rows.values, "row_grads": rows.grads, "column_values": columns.values, "column_grads": columns.grads, "norms": norms,
    }  # fmt: skip
    with _on(norms.device):
        return _gradients(pairs, backward_plan(_form(pairs), rows.names, columns.names, tuple(needs)), needs, values)


def loss(pairs: Pairs, names: tuple[str, ...], line: Line, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What is kept is one array, of what the gradient needs of each row and column (gradients.py)."""
    like, n = pairs.rows, pairs.shape[0]
    with _on(like.device):
        plan = loss_plan(_form(pairs), LineForm(names, line.reduction, line.lone == "skip"))
        loss = like.new_empty(n if line.reduction == "none" else (), dtype=torch.float32)
        kept = plan.kept.empty(like)
        numbers = line_numbers(line, like.dtype == torch.float16)
        plan.run({**pairs._asdict(), **numbers, "kept": kept, "loss": loss, "scratch": plan.scratch.empty(like)}, like.device)
    return loss, (kept,)


def loss_backward(
    pairs: Pairs, names: tuple[str, ...], line: Line, kept: Sequence[Tensor], grad: Tensor, needs: tuple[bool, bool, bool, bool]
) -> Gradients:
    with _on(grad.device):
        plan = loss_backward_plan(_form(pairs), LineForm(names, line.reduction, line.lone == "skip"), tuple(needs))
        return _gradients(pairs, plan, needs, {"kept": kept[0], "grad": grad})


def _gradients(pairs: Pairs, plan: Plan, needs: tuple[bool, bool, bool, bool], values: dict[str, Tensor]) -> Gradients:
    like, outputs = pairs.rows, plan.outputs
    of: Any = pairs  # what a gradient is needed of is a tensor
    da = torch.empty_like(like) if outputs[0] else None
    db = torch.empty_like(of.columns) if outputs[1] else None
    dbias = torch.empty_like(of.bias) if needs[2] else None
    dscale = torch.empty_like(of.scale) if needs[3] else None
    made = {"da": da, "db": db, "dbias": dbias, "dscale": dscale, "scratch": plan.scratch.empty(like) if plan.scratch.bytes else None}
    plan.run({**pairs._asdict(), **values, **made}, like.device)
    return Gradients(da if needs[0] else None, db if needs[1] else None, dbias, dscale)
