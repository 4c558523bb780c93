"""Which kernels serve a call, on which grids and with which arguments: plans, each made once for a form of problems."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...problem import LOG_SUMS, QUANTITIES, Line
from .launch import At, Buffer, Launch, Number, Plan
from .table import Tile, gradient_width, padded, tile

_FEW = 64  # terms in a sum, whose roundings to half precision do not average out


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


class Gpu(NamedTuple):
    family: str  # of table.py
    units: int  # multiprocessors
    precision: tuple[str, str]  # of fp32 products, and where they may use TF32


@dataclass(frozen=True, eq=False)  # there is one of each: form_of
class Form:
    """What of a problem decides its launches: all but addresses and the scale."""

    gpu: Gpu
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int, int]
    cross: bool
    unit: bool
    learned: bool
    bounded: bool
    bias: bool
    keys: bool
    own: bool
    precision: str  # of products

    @property
    def biased_self(self) -> bool:
        """A cross shape of the rows with themselves."""
        return self.bias and not self.cross

    @property
    def symmetric(self) -> bool:
        return not self.bias and not self.cross

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounded", self.bounded and not self.alone)

    @property
    def alone(self) -> bool:
        """At most one pair a row: "all" is its similarity to the bit, by running maxima, t rounded before the maximum is taken off."""
        return self.shape[1] <= (1 if self.cross and not self.own else 2)


form_of = functools.lru_cache(maxsize=1024)(Form)


def _kind(names: Iterable[str]) -> int:
    from .tiles import ALL, DIFFERENT, SPLIT

    log_sums = set(LOG_SUMS).intersection(names)
    kind: int = (ALL if log_sums <= {"all"} else DIFFERENT if log_sums == {"different"} else SPLIT).value
    return kind


def _inputs(form: Form) -> dict[str, Any]:
    """The arguments of a problem's tensors and numbers."""
    f32, i64 = torch.float32, torch.int64
    columns = "columns" if form.cross else "rows" if form.biased_self else None
    column_keys = "column_keys" if form.cross else "row_keys" if form.biased_self else None
    return {
        "a_ptr": At("rows", form.dtype), "b_ptr": columns and At(columns, form.dtype),
        "a_key_ptr": At("row_keys", i64) if form.keys else None, "b_key_ptr": At(column_keys, i64) if form.keys and column_keys else None,
        "bias_ptr": At("bias", f32) if form.bias else None, "own_ptr": At("own_column", i64) if form.own else None,
        "scale_ptr": At("scale", f32) if form.learned else None, "scale": 0.0 if form.learned else Number("scale"),
        "n": form.shape[0], "m": form.shape[1],
    }  # fmt: skip


def _of(names: tuple[str, ...], arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in names}


def _tiles(form: Form) -> dict[str, Any]:
    """The constants that forward_kernel and gradient_kernel share."""
    from .tiles import AS_THEY_ARE, FACTORS, SCALED

    wide = form.dtype == torch.float32
    return {
        "D": form.shape[2], "UNIT": (AS_THEY_ARE if not form.unit else SCALED if wide else FACTORS).value, "DIAGONAL": not form.cross,
        "BOUNDED": form.bounded, "FOLD": form.bounded and not form.learned and not wide, "PRECISION": form.precision,
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
    def arguments(self) -> dict[str, int]:
        return {
            "row_owners": self.owners[0], "column_owners": self.owners[1], "row_programs": self.owners[0] * self.splits[0],
            "row_tiles": self.tiles[0], "column_tiles": self.tiles[1],
        }  # fmt: skip


def _grid(gpu: Gpu, t: Tile, n: int, m: int, sides: tuple[bool, bool], chunks: int = 1) -> _Grid:
    """For the sides that are asked for; a side that is not has no owners."""

    def shared(asked: bool, own: int, other: int) -> tuple[int, int, int]:
        owners, stream = _cdiv(own, t.owned), _cdiv(other, t.streamed)
        tiles = _tiles_per_split(owners * chunks, stream, 2 * gpu.units)
        return (owners, _cdiv(stream, tiles), tiles) if asked else (0, 0, tiles)

    return _Grid(*zip(shared(sides[0], n, m), shared(sides[1], m, n), strict=True))


def _numbers_size(n: int, m: int) -> int:
    """Of a number for each row and after them each column, both aligned as tiles.aligned says."""
    return _cdiv(n, 16) * 16 + _cdiv(m, 16) * 16


def _rows_launch(form: Form, m: int, numbers: At, inverse: At | None, done: At | None = None) -> Launch:
    """Inverse norms of rows and after them of m columns if they become unit vectors, and what the forward's loop reads of each."""
    from .rows import rows_kernel

    n, _, depth = form.shape
    rows = max(1, 4096 // padded(depth))
    programs = _cdiv(n, rows)
    arguments = _of(("a_ptr", "b_ptr", "a_key_ptr", "b_key_ptr"), _inputs(form))
    arguments |= {"inverse_ptr": inverse, "numbers_ptr": numbers, "done_ptr": done, "n": n, "m": m, "row_programs": programs}
    return Launch(rows_kernel, (programs + _cdiv(m, rows),), {**arguments, "D": depth, "DEPTH": padded(depth), "ROWS": rows}, num_warps=4)


class _Sums(NamedTuple):
    """Where forward_kernel leaves the quantities of rows and of columns, or their parts, and constants that say which there are."""

    rows: At
    columns: At
    splits: tuple[int, int]
    places: dict[str, int]


def _sums(
    form: Form, names: tuple[tuple[str, ...], tuple[str, ...]], numbers: At | None, scratch: Buffer, join: bool
) -> tuple[Launch, _Sums]:
    """forward_kernel's launch and _Sums: parts where a side's stream has splits, or if they are asked for as parts (``join``)."""
    from .quantities import forward_kernel
    from .tiles import SPLIT

    n, m, depth = form.shape
    asked = {*names[0], *names[1]} if form.keys else set()  # without keys all pairs are of different keys
    kind, linear = _kind(asked), not asked.isdisjoint(("similarity", "count"))
    t = tile("forward", form.gpu.family, form.dtype, depth)
    grid = _grid(form.gpu, t, n, m, (bool(names[0]), bool(names[1])))
    rows, columns = At("row_values", torch.float32), At("column_values", torch.float32)
    parts = ()
    if join or max(grid.splits) > 1:
        parts = ("different", *(("equal",) if kind == SPLIT.value else ()), *(("similarity", "count") if linear else ()))
        rows, columns = (scratch.take(splits * len(parts) * count) for splits, count in zip(grid.splits, (n, m), strict=True))
    places = {
        "KIND": kind, "ROW_PLACES": _places(names[0]), "COLUMN_PLACES": _places(names[1]), "PARTS": _places(parts) if parts else 0,
    }  # fmt: skip
    arguments = {
        **_inputs(form), **_tiles(form), **grid.arguments, **places, "numbers_ptr": numbers, "rows_ptr": rows, "columns_ptr": columns,
        "SIMILARITY": linear, "OWNED": t.owned, "STREAMED": t.streamed, "DEPTH": t.depth,
    }  # fmt: skip
    options = {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": not form.alone}
    return Launch(forward_kernel, (grid.programs,), arguments, **options), _Sums(rows, columns, grid.splits, places)


@functools.lru_cache(maxsize=1024)
def forward_plan(form: Form, row_names: tuple[str, ...], column_names: tuple[str, ...]) -> Plan:
    from .quantities import join_kernel

    n, m, _ = form.shape
    scratch, numbers, launches = Buffer("scratch"), None, []
    if form.unit or form.keys:
        columns = m if form.cross else 0
        numbers = scratch.take(_numbers_size(n, columns), torch.int64)
        launches.append(_rows_launch(form, columns, numbers, At("norms", torch.float32) if form.unit else None))
    launch, sums = _sums(form, (row_names, column_names), numbers, scratch, join=False)
    launches.append(launch)
    if sums.places["PARTS"]:
        programs = [_cdiv(count, 32) if splits else 0 for splits, count in zip(sums.splits, (n, m), strict=True)]
        arguments = {
            "row_parts_ptr": sums.rows, "column_parts_ptr": sums.columns,
            "rows_ptr": At("row_values", torch.float32), "columns_ptr": At("column_values", torch.float32),
            "n": n, "m": m, "row_splits": sums.splits[0], "column_splits": sums.splits[1], "row_programs": programs[0],
            **sums.places, "ROWS": 32, "SPLITS": padded(max(sums.splits)),
        }  # fmt: skip
        launches.append(Launch(join_kernel, (sum(programs),), arguments, num_warps=4))
    return Plan(launches, scratch)


class _Weights(NamedTuple):
    """How gradient_kernel finds the weights of pairs: the rows' numbers, and of a loss its gradient (``each``: a row's)."""

    kind: int
    one_sided: int
    similarity: bool
    numbers: At
    inverse: tuple[At | None, At | None]
    grad: At | None = None
    each: bool = False


def _gradient(form: Form, weights: _Weights, needs: tuple[bool, bool, bool, bool], scratch: Buffer, *before: Launch) -> Plan:
    from .gradients import finish_kernel, gradient_kernel
    from .tiles import SPLIT

    n, m, depth = form.shape
    # of the self shape with a bias, a row's gradient comes from both of its places, as parts of one sum
    sides = (needs[0] or needs[3], not form.symmetric and (needs[1] or needs[2] or (form.biased_self and needs[0])))
    light = not (needs[3] or form.bias or form.own or weights.kind == SPLIT.value)
    t = tile("gradient" if light else "heavy gradient", form.gpu.family, form.dtype, depth)
    width = gradient_width(form.dtype, depth, t)
    chunks = _cdiv(depth, width)
    grid = _grid(form.gpu, t, n, m, sides, chunks)
    row_splits, column_splits = grid.splits
    split = max(grid.splits) > 1 or chunks > 1 or (form.biased_self and all(sides))
    outputs = sides[0] or form.biased_self, sides[1] and not form.biased_self
    # a side that is not asked for has no programs: any pointer serves
    da, db = (At(name if exists else other, form.dtype) for name, other, exists in zip(("da", "db"), ("db", "da"), outputs, strict=True))
    dbias, dscale = (At(name, torch.float32) if need else None for name, need in zip(("dbias", "dscale"), needs[2:], strict=True))
    da_parts, db_parts, dbias_parts = da, db, dbias
    if split:
        da_parts = scratch.take((row_splits * n + column_splits * m) * depth)
        db_parts = da_parts.after(row_splits * n * depth)
        dbias_parts = scratch.take(column_splits * m) if needs[2] else None
    dscale_parts = scratch.take(row_splits * n) if needs[3] else None
    inputs, tiles = _inputs(form), _tiles(form)
    inverse = dict(zip(("a_inverse_ptr", "b_inverse_ptr"), weights.inverse, strict=True))
    arguments = {
        **inputs, **tiles, **grid.arguments, **inverse, "numbers_ptr": weights.numbers, "grad_ptr": weights.grad,
        "da_ptr": da_parts, "db_ptr": None if form.symmetric else db_parts, "dbias_ptr": dbias_parts, "dscale_ptr": dscale_parts,
        "KIND": weights.kind, "ONE_SIDED": weights.one_sided, "SIMILARITY": weights.similarity, "EACH": weights.each, "PARTS": split,
        "RESIDUAL": form.dtype != torch.float32 and min(n, m) <= _FEW,
        "OWNED": t.owned, "STREAMED": t.streamed, "DEPTH": t.depth, "WIDTH": width,
    }  # fmt: skip
    options = {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": not form.alone}
    launches = [*before, Launch(gradient_kernel, (grid.programs, chunks), arguments, **options)]
    if split or needs[3]:
        block = max(1, 4096 // padded(depth))
        programs = _cdiv(n, block) if split and outputs[0] else 0, _cdiv(m, block) if split and outputs[1] else 0
        cross = form.cross
        arguments = {
            "a_ptr": inputs["a_ptr"], "b_ptr": inputs["b_ptr"] if cross else None, **inverse,
            "da_parts_ptr": da_parts, "db_parts_ptr": db_parts if cross else None, "dbias_parts_ptr": dbias_parts,
            "dscale_parts_ptr": dscale_parts, "da_ptr": da, "db_ptr": db if cross else None, "dbias_ptr": dbias, "dscale_ptr": dscale,
            "n": n, "m": m, "row_splits": row_splits + column_splits * form.biased_self, "column_splits": column_splits,
            "row_programs": programs[0], "row_and_column_programs": sum(programs), "scale_numbers": row_splits * n,
            "share": 0.5 if form.symmetric else 1.0,
            "D": depth, "ROWS": block, "WIDTH": padded(depth), "UNIT": tiles["UNIT"], "PRECISION": form.precision,
        }  # fmt: skip
        launches.append(Launch(finish_kernel, (sum(programs) + needs[3],), arguments, num_warps=4))
    return Plan(launches, scratch, outputs=outputs)


@functools.lru_cache(maxsize=1024)
def backward_plan(form: Form, row_names: tuple[str, ...], column_names: tuple[str, ...], needs: tuple[bool, bool, bool, bool]) -> Plan:
    from .gradients import BOTH_SIDES, OF_COLUMNS, OF_ROWS, weights_kernel

    n, m, _ = form.shape
    names = {*row_names, *column_names}
    of_rows, of_columns = (not set(LOG_SUMS).isdisjoint(side) for side in (row_names, column_names))
    one_sided = BOTH_SIDES if form.symmetric or of_rows == of_columns else OF_ROWS if of_rows else OF_COLUMNS
    scratch, other = Buffer("scratch"), 0 if form.symmetric else m
    numbers = scratch.take(4 * _numbers_size(n, other) + 2, torch.int64)
    norms = At("norms", torch.float32)
    inverse = (norms, norms.after(n) if form.cross else norms) if form.unit else (None, None)
    weights = _Weights(_kind(names), one_sided.value, form.keys and "similarity" in names, numbers, inverse)
    sides: dict[str, At | None] = {
        f"{of}_ptr": At(of, torch.float32) for of in ("row_values", "row_grads", "column_values", "column_grads")
    }
    if form.symmetric:
        sides |= {"column_values_ptr": None, "column_grads_ptr": None}
    programs = _cdiv(n, 128), _cdiv(other, 128)
    arguments = {
        **sides, **_of(("a_key_ptr", "b_key_ptr", "scale_ptr", "scale", "n", "m"), _inputs(form)),
        "a_inverse_ptr": inverse[0], "b_inverse_ptr": inverse[1], "numbers_ptr": numbers, "row_programs": programs[0],
        "BOUNDED": form.bounded, "KIND": weights.kind, "ONE_SIDED": weights.one_sided, "ROW_PLACES": _places(row_names),
        "COLUMN_PLACES": _places(row_names if form.symmetric else column_names), "HALF": form.dtype == torch.float16, "BLOCK": 128,
    }  # fmt: skip
    return _gradient(form, weights, needs, scratch, Launch(weights_kernel, (sum(programs),), arguments, num_warps=4))


class LineForm(NamedTuple):
    """What of a line decides the launches: all but its numbers."""

    names: tuple[str, ...]
    reduction: str
    skip: bool


@functools.lru_cache(maxsize=256)
def line_numbers(line: Line, half: bool) -> dict[str, float]:
    """LIFT makes weights of fp16 as large as fit, whose coefficients come from a row and from a column."""
    from .gradients import LIFT

    of = {f"of_{name}": float(getattr(line, name)) for name in (*QUANTITIES[:4], "log_count")}
    lift = LIFT.value / max(2 * sum(abs(of[f"of_{name}"]) for name in QUANTITIES[:4]), 1e-30) if half else 1.0
    lone = math.nan if line.lone == "nan" else 0.0
    return {**of, "factor": float(line.factor), "lone": lone, "lift": lift, "unlift": float(line.factor) / lift}


def _kept(form: Form) -> tuple[Buffer, At, At | None, int]:
    """What a loss' forward leaves for its backward: the rows' numbers, the inverse norms; and of how many columns."""
    n, m, _ = form.shape
    kept, columns = Buffer("kept"), 0 if form.symmetric else m
    numbers = kept.take(4 * _numbers_size(n, columns) + 2, torch.int64)
    return kept, numbers, kept.take(n + columns) if form.unit else None, columns


@functools.lru_cache(maxsize=1024)
def loss_plan(form: Form, line: LineForm) -> Plan:
    from .lines import loss_kernel

    n = form.shape[0]
    kept, numbers, inverse, columns = _kept(form)
    scratch = Buffer("scratch")
    done = scratch.take(1, torch.int32)
    launch, sums = _sums(form, (line.names, ()), numbers, scratch, join=True)
    splits = 1 << (sums.splits[0] - 1).bit_length()
    rows = max(16, 1024 // splits)
    programs = _cdiv(n, rows)
    arguments = {
        "parts_ptr": sums.rows, "numbers_ptr": numbers, "inverse_ptr": inverse,
        **_of(("scale_ptr", "scale", "n"), _inputs(form)), "m": columns, "splits": sums.splits[0], "row_programs": programs,
        "sums_ptr": scratch.take(2 * programs), "done_ptr": done, "loss_ptr": At("loss", torch.float32),
        **{name: Number(name) for name in line_numbers(Line(), False)},
        "PARTS": sums.places["PARTS"], "KIND": sums.places["KIND"], "BOUNDED": form.bounded,
        "NAMES": sum(1 << QUANTITIES.index(name) for name in line.names), "REDUCTION": line.reduction, "SKIP": line.skip,
        "HALF": form.unit and form.dtype == torch.float16, "CROSS": columns > 0, "ROWS": rows, "SPLITS": splits,
    }  # fmt: skip
    last = Launch(loss_kernel, (programs + _cdiv(columns, rows),), arguments, num_warps=4)
    return Plan([_rows_launch(form, columns, numbers, inverse, done), launch, last], scratch, kept)


@functools.lru_cache(maxsize=1024)
def loss_backward_plan(form: Form, line: LineForm, needs: tuple[bool, bool, bool, bool]) -> Plan:
    from .gradients import BOTH_SIDES, OF_ROWS

    _, numbers, inverse, _ = _kept(form)
    asked = line.names if form.keys else ()
    one_sided = BOTH_SIDES if form.symmetric or set(LOG_SUMS).isdisjoint(line.names) else OF_ROWS
    sides = inverse, inverse and (inverse.after(form.shape[0]) if form.cross else inverse)
    grad = At("grad", torch.float32)
    weights = _Weights(_kind(asked), one_sided.value, "similarity" in asked, numbers, sides, grad, line.reduction == "none")
    return _gradient(form, weights, needs, Buffer("scratch"))
