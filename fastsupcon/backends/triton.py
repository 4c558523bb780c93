"""The Triton kernels on NVIDIA, AMD and Intel GPUs: which of them serves a call, on which grid. They are in _triton_*.py beside this file.

                              forward                                             backward
    self, exp(s) in range     triangle_kernel; past 65,536 rows forward_kernel   gradient_kernel SYMMETRIC
    self, anything else       forward_kernel                                      gradient_kernel BOTH
    cross                     forward_kernel                                      gradient_kernel ROWS (da), COLUMNS (db, dbias)

Nothing here waits for the device or looks at values in it, and every sum has a fixed order. Triton is imported by the first call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from typing import NamedTuple

import torch
from torch import Tensor

from ._dtypes import fixed_shift_is_safe, tf32_allowed
from ._triton_table import family, gradient_width, padded, tile

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


def self_forward(z: Tensor, scale: float, unit_rows: bool) -> Tensor:
    from ._triton_tiles import ITSELF
    from ._triton_triangle import LARGEST

    fixed = unit_rows and fixed_shift_is_safe(abs(scale))
    if fixed and len(z) <= LARGEST:
        return _triangle(z, scale)
    return _forward(z, z, None, None, None, scale, ITSELF, fixed)


def self_backward(z: Tensor, lse: Tensor, grad: Tensor, scale: float, unit_rows: bool) -> Tensor:
    from ._triton_gradient import BOTH, SYMMETRIC
    from ._triton_tiles import ITSELF

    weight = SYMMETRIC if unit_rows and fixed_shift_is_safe(abs(scale)) else BOTH
    prepared = _prepare(z, lse, grad, weight)
    dz, _ = _gradient(z, z, prepared, (None, None), (None, None), scale, ITSELF, weight, (True, False))
    return dz


def cross_forward(a, b, bias, skip, row_labels, column_labels, scale) -> Tensor:
    a_key, b_key, forbidden = _keys(skip, row_labels, column_labels)
    return _forward(a, b, bias, a_key, b_key, scale, forbidden, False)


def cross_backward(a, b, bias, skip, row_labels, column_labels, lse, grad, scale, needs):
    from ._triton_gradient import COLUMNS, ROWS

    a_key, b_key, forbidden = _keys(skip, row_labels, column_labels)
    prepared = _prepare(a, lse, grad, ROWS)
    da = db = dbias = None
    if needs[0]:
        da, _ = _gradient(a, b, prepared, (None, bias), (a_key, b_key), scale, forbidden, ROWS, (True, False))
    if needs[1] or needs[2]:
        db, dbias = _gradient(b, a, prepared, (bias, None), (b_key, a_key), scale, forbidden, COLUMNS, needs[1:])
    return da, db, dbias


def _keys(skip: Tensor | None, row_labels: Tensor | None, column_labels: Tensor | None):
    """A pair is not allowed where the row's key equals the column's. A key that is None is the index itself."""
    from ._triton_tiles import EQUAL_KEYS, NONE

    if skip is not None:
        return skip, None, EQUAL_KEYS
    return row_labels, column_labels, NONE if row_labels is None else EQUAL_KEYS


class _Gpu(NamedTuple):
    family: str  # of _triton_table
    units: int  # multiprocessors
    precision: dict[bool, str]  # of fp32 products, by whether they may use TF32


@functools.cache
def _gpu(device: torch.device) -> _Gpu:
    if device.type == "cpu":
        return _Gpu("interpreter", 4, dict.fromkeys((False, True), "interpreter"))
    from triton.runtime import driver

    target = driver.active.get_current_target()
    units = driver.active.utils.get_device_properties(device.index)["multiprocessor_count"] if device.type == "cuda" else 64
    kind = family(target.backend, target.arch)
    # three TF32 products of the operands' upper and lower halves are as accurate as fp32, and several times faster than fp32's own units
    full, tf32 = ("ieee", "ieee") if target.backend != "cuda" else ("tf32x3", "tf32")
    return _Gpu(kind, units, {False: full, True: tf32})


def _precision(gpu: _Gpu, dtype: torch.dtype) -> str:
    """Of products; half types have only one, "ieee"."""
    return gpu.precision[tf32_allowed()] if dtype == torch.float32 or gpu.family == "interpreter" else "ieee"


def _on(device: torch.device):
    """Triton launches on the current device."""
    if device.type == "cpu" or device.index == torch.get_device_module(device).current_device():
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@functools.lru_cache(maxsize=1024)
def _tiles_per_split(owners: int, tiles: int, slots: int) -> int:
    """Of the stream's tiles, those one program visits, such that ``owners`` tiles of rows fill the GPU's ``slots`` programs at a time.

    Costs counted in tiles: the longest program times the waves of programs, and one for each split that has to be summed.
    """
    most = max(1, min(tiles, 2 * slots // owners))
    splits = min(range(1, most + 1), key=lambda count: -(-owners * count // slots) * -(-tiles // count) + count)
    return -(-tiles // splits)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _triangle(z: Tensor, scale: float) -> Tensor:
    from ._triton_triangle import group_rows, triangle_kernel

    n, depth = z.shape
    with _on(z.device):
        gpu = _gpu(z.device)
        t = tile("triangle", gpu.family, z.dtype, depth)
        group = group_rows(n)
        groups = _cdiv(n, group)
        partial = z.new_empty(groups, n, dtype=torch.float32)
        triangle_kernel[(groups, groups // 2 + 1)](
            z, partial, n, groups, scale, D=depth, OWNED=t.owned, STREAMED=t.streamed, DEPTH=t.depth, GROUP=group,
            PRECISION=_precision(gpu, z.dtype), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        return partial.sum(0).log_()


def _forward(a, b, bias, a_key, b_key, scale: float, forbidden, fixed: bool) -> Tensor:
    from ._triton_forward import forward_kernel, join_kernel

    (n, depth), m = a.shape, len(b)
    with _on(a.device):
        gpu = _gpu(a.device)
        t = tile("forward", gpu.family, a.dtype, depth)
        owners, tiles = _cdiv(n, t.owned), _cdiv(m, t.streamed)
        per_split = _tiles_per_split(owners, tiles, 2 * gpu.units)
        splits = _cdiv(tiles, per_split)
        partial = a.new_empty(splits, n, dtype=torch.float32)
        forward_kernel[(owners, splits)](
            a, b, bias, a_key, b_key, partial, n, m, scale, per_split, D=depth, OWNED=t.owned, STREAMED=t.streamed, DEPTH=t.depth,
            FORBIDDEN=forbidden, FIXED=fixed, PRECISION=_precision(gpu, a.dtype), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        if splits == 1:
            return partial[0]
        lse = a.new_empty(n, dtype=torch.float32)
        join_kernel[(_cdiv(n, 32),)](partial, lse, n, splits, ROWS=32, SPLITS=padded(splits), num_warps=4)
        return lse


def _prepare(rows: Tensor, lse: Tensor, grad: Tensor, weight) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(lse, weight, largest |grad|) as gradient_kernel reads them."""
    from ._triton_gradient import SYMMETRIC, prepare_kernel

    n = len(lse)
    safe_lse = None if weight == SYMMETRIC else torch.empty_like(lse)
    weights = torch.empty_like(grad)
    peak = lse.new_empty(1) if rows.dtype == torch.float16 else None
    with _on(rows.device):
        prepare_kernel[(_cdiv(n, 1024),)](lse, grad, safe_lse, weights, peak, n, BLOCK=1024, num_warps=4)
    return safe_lse, weights, peak


def _gradient(x, y, prepared, x_y_bias, x_y_key, scale: float, forbidden, weight, needs: tuple[bool, bool]):
    """(dx, dbias) of the owned rows x, from the streamed rows y; None where not needed."""
    from ._triton_gradient import SYMMETRIC, gradient_kernel

    (n, depth), m = x.shape, len(y)
    with _on(x.device):
        gpu = _gpu(x.device)
        t = tile("symmetric gradient" if weight == SYMMETRIC else "gradient", gpu.family, x.dtype, depth)
        width = gradient_width(x.dtype, depth, t)
        owners, tiles, chunks = _cdiv(n, t.owned), _cdiv(m, t.streamed), _cdiv(depth, width)
        per_split = _tiles_per_split(owners * chunks, tiles, 2 * gpu.units)
        splits = _cdiv(tiles, per_split)
        dx = x.new_empty(splits, n, depth, dtype=x.dtype if splits == 1 else torch.float32) if needs[0] else None
        dbias = x.new_empty(splits, n, dtype=torch.float32) if needs[1] else None
        gradient_kernel[(owners, chunks, splits)](
            x, y, *prepared, *x_y_bias, *x_y_key, dx, dbias, n, m, scale, per_split,
            D=depth, OWNED=t.owned, STREAMED=t.streamed, DEPTH=t.depth, WIDTH=width,
            FORBIDDEN=forbidden, WEIGHT=weight, PRECISION=_precision(gpu, x.dtype), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        return (
            None if dx is None else dx[0] if splits == 1 else dx.sum(0).to(x.dtype),
            None if dbias is None else dbias[0] if splits == 1 else dbias.sum(0),
        )
