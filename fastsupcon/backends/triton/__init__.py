"""The Triton kernels on NVIDIA, AMD and Intel GPUs: which of them serve a call, on which grids. They are in the files beside this one.

    forward         rows_kernel if unit or with keys; forward_kernel; join_kernel if a side's stream has splits
    line            line_kernel
    line_backward   line_backward_kernel
    backward        weights_kernel but for few pairs; gradient_kernel; finish_kernel if there are parts to sum

So a step is six to eight launches, and no operator of torch's launches beside them. Nothing here waits for the device or looks at values
in it, and every sum has a fixed order. Triton is imported by the first call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shutil
from typing import NamedTuple

import torch
from torch import Tensor

from ...problem import LOG_SUMS, QUANTITIES, Gradients, Line, Pairs, Side, Terms
from .._dtypes import is_bounded, tf32_allowed
from .table import family, gradient_width, padded, tile

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_DEPTH = 1024
_FEW_PAIRS = 1 << 22  # for which a launch that makes the weights of rows costs more than it saves; heavy gradients lack the registers
_FEW = 64  # terms in a sum, whose roundings to half precision do not average out


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


class _Gpu(NamedTuple):
    family: str  # of table.py
    units: int  # multiprocessors
    precision: dict[bool, str]  # of fp32 products, by whether they may use TF32


@functools.cache
def _gpu(device: torch.device) -> _Gpu:
    if device.type == "cpu":
        return _Gpu("interpreter", 1, dict.fromkeys((False, True), "interpreter"))
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


@functools.cache
def _places(names: tuple[str, ...]) -> int:
    """Where each quantity stands among the names, for the kernels: four bits each, 15 for none, and above them how many there are."""
    return sum((names.index(name) if name in names else 15) << 4 * k for k, name in enumerate(QUANTITIES)) | len(names) << 20


def _kind(names: set[str]):
    from .tiles import ALL, DIFFERENT, SPLIT

    log_sums = names & set(LOG_SUMS)
    return (ALL if log_sums <= {"all"} else DIFFERENT if log_sums == {"different"} else SPLIT).value


def _problem(pairs: Pairs, gpu: _Gpu) -> dict:
    """What forward_kernel and gradient_kernel share. A self shape with a bias is a cross shape of the rows with themselves."""
    from .tiles import AS_THEY_ARE, FACTORS, SCALED

    n, m, depth = pairs.shape
    cross = pairs.columns is not None
    biased_self = not cross and pairs.bias is not None
    learned = isinstance(pairs.scale, Tensor)
    # with at most one pair a row, "all" is its similarity to the bit: by running maxima, and t is rounded before the maximum is taken off
    alone = m <= (1 if cross and pairs.own_column is None else 2)
    bounded = pairs.unit and pairs.bias is None and not alone and (learned or is_bounded(abs(pairs.scale)))
    return {
        "a_ptr": pairs.rows, "b_ptr": pairs.columns if cross else pairs.rows if biased_self else None,
        "a_key_ptr": pairs.row_keys, "b_key_ptr": pairs.column_keys if cross else pairs.row_keys if biased_self else None,
        "own_ptr": pairs.own_column, "bias_ptr": pairs.bias,
        "scale_ptr": pairs.scale if learned else None, "scale": 0.0 if learned else float(pairs.scale), "n": n, "m": m, "D": depth,
        "UNIT": AS_THEY_ARE if not pairs.unit else SCALED if pairs.rows.dtype == torch.float32 else FACTORS, "DIAGONAL": not cross,
        "BOUNDED": bounded, "FOLD": bounded and not learned and pairs.rows.dtype != torch.float32,
        "PRECISION": _precision(gpu, pairs.rows.dtype), "enable_fp_fusion": not alone,
    }  # fmt: skip


class _Grid(NamedTuple):
    """How one launch is shared: for each side (rows, columns) its tiles of owned rows, the splits of its stream, and the tiles in each."""

    owners: tuple[int, int]
    splits: tuple[int, int]
    tiles: tuple[int, int]

    @property
    def programs(self) -> int:
        return sum(owners * splits for owners, splits in zip(self.owners, self.splits, strict=True))

    @property
    def arguments(self) -> dict:
        return {
            "row_owners": self.owners[0], "column_owners": self.owners[1], "row_programs": self.owners[0] * self.splits[0],
            "row_tiles": self.tiles[0], "column_tiles": self.tiles[1],
        }  # fmt: skip


def _grid(gpu: _Gpu, t, n: int, m: int, sides: tuple[bool, bool], chunks: int = 1) -> _Grid:
    """For the sides that are asked for; a side that is not has no owners."""
    owners, splits, tiles = [], [], []
    for asked, own, other in zip(sides, (n, m), (m, n), strict=True):
        count, stream = _cdiv(own, t.owned), _cdiv(other, t.streamed)
        tiles.append(_tiles_per_split(count * chunks, stream, 2 * gpu.units))
        owners.append(count if asked else 0)
        splits.append(_cdiv(stream, tiles[-1]) if asked else 0)
    return _Grid(tuple(owners), tuple(splits), tuple(tiles))


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _numbers(pairs: Pairs) -> tuple[Tensor, Tensor | None]:
    """Inverse norms of rows and after them columns if they become unit vectors, and what the forward's loop reads of each: one launch."""
    from .rows import rows_kernel

    n, m, depth = pairs.shape
    m = 0 if pairs.columns is None else m
    inverse = _empty(pairs.rows, n + m if pairs.unit else 0)
    if not pairs.unit and pairs.row_keys is None:
        return inverse, None
    numbers = _empty(pairs.rows, _numbers_size(n, m), dtype=torch.int64)
    rows = max(1, 4096 // padded(depth))
    programs = _cdiv(n, rows)
    rows_kernel[(programs + _cdiv(m, rows),)](
        pairs.rows, pairs.columns, pairs.row_keys, pairs.column_keys, inverse if pairs.unit else None, numbers, n, m, programs,
        D=depth, DEPTH=padded(depth), ROWS=rows, num_warps=4,
    )  # fmt: skip
    return inverse, numbers


def _numbers_size(n: int, m: int) -> int:
    """Of a number for each row and after them each column, both aligned as tiles.aligned says."""
    return _cdiv(n, 16) * 16 + _cdiv(m, 16) * 16


def forward(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...], keep: bool) -> Terms:
    from .quantities import forward_kernel, join_kernel
    from .tiles import SPLIT

    n, m, depth = pairs.shape
    a = pairs.rows
    names = {*row_names, *column_names} if pairs.row_keys is not None else set()  # without keys all pairs are of different keys
    kind, linear = _kind(names), not names.isdisjoint(("similarity", "count"))
    rows, columns = _empty(a, len(row_names), n), _empty(a, len(column_names), m)
    with _on(a.device):
        gpu = _gpu(a.device)
        norms, numbers = _numbers(pairs)
        t = tile("forward", gpu.family, a.dtype, depth)
        grid = _grid(gpu, t, n, m, (bool(row_names), bool(column_names)))
        split = max(grid.splits) > 1
        parts = ("different", *(("equal",) if kind == SPLIT.value else ()), *(("similarity", "count") if linear else ()))
        places = {"KIND": kind, "ROW_PLACES": _places(row_names), "COLUMN_PLACES": _places(column_names)}
        places["PARTS"] = _places(parts) if split else 0
        out = [_empty(a, s, len(parts), k) for s, k in zip(grid.splits, (n, m), strict=True)] if split else (rows, columns)
        forward_kernel[(grid.programs,)](
            **_problem(pairs, gpu), **grid.arguments, **places, rows_ptr=out[0], columns_ptr=out[1], SIMILARITY=linear,
            numbers_ptr=numbers,
            OWNED=t.owned, STREAMED=t.streamed, DEPTH=t.depth, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        if split:
            programs = [_cdiv(k, 32) if s else 0 for s, k in zip(grid.splits, (n, m), strict=True)]
            join_kernel[(sum(programs),)](
                *out, rows, columns, n, m, *grid.splits, programs[0], **places, ROWS=32, SPLITS=padded(max(grid.splits)), num_warps=4
            )
    return Terms(rows, columns, norms, _empty(a, 0))


def backward(pairs: Pairs, rows: Side, columns: Side, norms: Tensor, kept: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    from .gradients import BOTH_SIDES, OF_COLUMNS, OF_ROWS, finish_kernel, gradient_kernel, weights_kernel
    from .tiles import SPLIT

    n, m, depth = pairs.shape
    a = pairs.rows
    symmetric = pairs.columns is None and pairs.bias is None
    biased_self = pairs.columns is None and not symmetric  # a row's gradient comes from both of its places, as parts of one sum
    sides = (needs[0] or needs[3], not symmetric and (needs[1] or needs[2] or (biased_self and needs[0])))
    names = {*rows.names, *columns.names}
    kind = _kind(names)
    of_rows, of_columns = (not set(LOG_SUMS).isdisjoint(side.names) for side in (rows, columns))
    light = not needs[3] and pairs.bias is None and pairs.own_column is None and kind != SPLIT.value
    with _on(a.device):
        gpu = _gpu(a.device)
        t = tile("gradient" if light else "heavy gradient", gpu.family, a.dtype, depth)
        width = gradient_width(a.dtype, depth, t)
        chunks = _cdiv(depth, width)
        grid = _grid(gpu, t, n, m, sides, chunks)
        row_splits, column_splits = grid.splits
        split = max(grid.splits) > 1 or chunks > 1 or (biased_self and all(sides))
        da = _empty(a, n, depth, dtype=a.dtype) if sides[0] or biased_self else None
        db = _empty(a, m, depth, dtype=a.dtype) if sides[1] and not biased_self else None
        dbias = _empty(a, m) if needs[2] else None
        dscale = _empty(a) if needs[3] else None
        # a side that is not asked for has no programs: any pointer serves
        da_parts, db_parts, dbias_parts = db if da is None else da, da if db is None else db, dbias
        if split:
            da_parts = _empty(a, (row_splits * n + column_splits * m) * depth)
            db_parts = da_parts[row_splits * n * depth :]
            dbias_parts = _empty(a, column_splits, m) if needs[2] else None
        dscale_parts = _empty(a, row_splits, n) if needs[3] else None
        problem = _problem(pairs, gpu)
        inverse = (norms, norms if pairs.columns is None else norms[n:]) if pairs.unit else (None, None)
        sides_of = {
            "row_values_ptr": rows.values, "row_grads_ptr": rows.grads, "column_values_ptr": None if symmetric else columns.values,
            "column_grads_ptr": None if symmetric else columns.grads, "a_inverse_ptr": inverse[0], "b_inverse_ptr": inverse[1],
            "KIND": kind, "ONE_SIDED": BOTH_SIDES if symmetric or of_rows == of_columns else OF_ROWS if of_rows else OF_COLUMNS,
            "ROW_PLACES": _places(rows.names), "COLUMN_PLACES": _places(rows.names if symmetric else columns.names),
        }  # fmt: skip
        numbers = None
        if not light or max(grid.splits) == 1 or n * m > _FEW_PAIRS:
            numbers = _empty(a, 4 * _numbers_size(n, 0 if symmetric else m) + 2, dtype=torch.int64)
            programs = _cdiv(n, 128), 0 if symmetric else _cdiv(m, 128)
            shared = {name: problem[name] for name in ("a_key_ptr", "b_key_ptr", "scale_ptr", "n", "m", "scale", "BOUNDED")}
            weights_kernel[(sum(programs),)](
                **sides_of, **shared, numbers_ptr=numbers, row_programs=programs[0], HALF=a.dtype == torch.float16, BLOCK=128, num_warps=4
            )
        gradient_kernel[(grid.programs, chunks)](
            **problem, **grid.arguments, **sides_of, numbers_ptr=numbers,
            da_ptr=da_parts, db_ptr=None if symmetric else db_parts, dbias_ptr=dbias_parts, dscale_ptr=dscale_parts,
            SIMILARITY=pairs.row_keys is not None and "similarity" in names, PARTS=split,
            RESIDUAL=a.dtype != torch.float32 and min(n, m) <= _FEW,
            OWNED=t.owned, STREAMED=t.streamed, DEPTH=t.depth, WIDTH=width, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        if split or needs[3]:
            block = max(1, 4096 // padded(depth))
            row_programs = _cdiv(n, block) if split and da is not None else 0
            column_programs = _cdiv(m, block) if split and db is not None else 0
            finish_kernel[(row_programs + column_programs + needs[3],)](
                a, pairs.columns, *inverse,
                da_parts, None if pairs.columns is None else db_parts, dbias_parts, dscale_parts,
                db if da is None else da, None if pairs.columns is None else da if db is None else db, dbias, dscale,
                n, m, row_splits + column_splits * biased_self, column_splits, row_programs, row_programs + column_programs,
                row_splits * n, 0.5 if symmetric else 1.0,
                D=depth, ROWS=block, WIDTH=padded(depth), UNIT=problem["UNIT"], PRECISION=problem["PRECISION"], num_warps=4,
            )  # fmt: skip
    return Gradients(da if needs[0] else None, db if needs[1] else None, dbias, dscale)


def _line(names: tuple[str, ...], line: Line) -> dict:
    return {
        "all": float(line.all), "different": float(line.different), "equal": float(line.equal), "similarity": float(line.similarity),
        "factor": float(line.factor), "lone": math.nan if line.lone == "nan" else 0.0, "PLACES": _places(names),
        "REDUCTION": line.reduction, "SKIP": line.lone == "skip",
    }  # fmt: skip


def line(names: tuple[str, ...], values: Tensor, line: Line) -> Tensor:
    from .rows import line_kernel

    n = values.shape[1]
    loss = values.new_empty(n if line.reduction == "none" else ())
    with _on(values.device):
        programs = _cdiv(n, 1024) if line.reduction == "none" else 1
        line_kernel[(programs,)](values, loss, n, log_count=float(line.log_count), **_line(names, line), BLOCK=1024, num_warps=4)
    return loss


def line_backward(names: tuple[str, ...], values: Tensor, grad: Tensor, line: Line) -> Tensor:
    from .rows import line_backward_kernel

    n = values.shape[1]
    grads = torch.empty_like(values)
    with _on(values.device):
        line_backward_kernel[(_cdiv(n, 1024),)](values, grad, grads, n, **_line(names, line), BLOCK=1024, num_warps=4)
    return grads
