"""The CUDA backend without a GPU, held to the contract: its sources compiled as plain C++ over the emulator of tests/cuda_emulation."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import built_once
from contract import CASES, LINES, PSC, SCL, Case, check, incoming, problem, run
from cuda_emulation.backend import emulated_backend
from table import LOSSES
from test_losses import assert_agrees

from fastsupcon.backends import BACKENDS, cuda, reference
from fastsupcon.backends._extension import missing as extension_missing
from fastsupcon.problem import Line, Pairs, Side

ROOT = Path(__file__).resolve().parents[1]
UNITS = ["wgmma_f16.cu", "wgmma_bf16.cu", "plan.cu", "mma_f16.cu", "mma_bf16.cu", "mma_tf32.cu", "mma_f32.cu"]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MMA, WGMMA = 80, 90  # compute capability, and by it the family of kernels
HOST = torch.device("cpu")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to bind the emulated kernels")
    if extension_missing:
        pytest.skip(extension_missing)
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("g++ or the sources are not here")
    here = ROOT / "tests" / "cuda_emulation"
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    for folder in (here, ROOT / "csrc" / "cuda", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")):
        flags += ["-I", str(folder)]
    # The tensor cores' products are in emulator.cpp, and the binding runs once a call.
    sources = {here / "emulator.cpp": "-O3", here / "module.cpp": "-O0"} | {ROOT / "csrc" / "cuda" / unit: "-O1" for unit in UNITS}

    def build(out: Path) -> None:
        def compile_unit(source: Path) -> str:
            target = str(out / f"{source.name}.o")
            subprocess.run([compiler, "-x", "c++", *flags, sources[source], "-c", str(source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_unit, reversed(sources)))
        subprocess.run([compiler, "-shared", *objects, "-o", str(out / name)], check=True)

    name = f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    library = built_once(tmp_path_factory, "emulated", build) / name
    spec = importlib.util.spec_from_file_location("emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_the_kernels_compile(emulated):
    """For all tests here, which the rest of the suite gives time to."""
    assert emulated.without_cuda() == ""


@pytest.fixture
def on(emulated):
    """on(capability, multiprocessors): the backend on such a device, its log of launches empty."""

    def on(capability: int, multiprocessors: int = 4):
        emulated.set_device(multiprocessors, capability)
        emulated.launched()
        return emulated_backend(emulated)

    return on


def names(emulated) -> list[str]:
    return [name for name, _ in emulated.launched()]


def contract_cases() -> list:
    """Single precision, and half types on Hopper, where what wgmma does not serve falls to mma.sync; some of those on Ampere too."""
    tame = [case for case in CASES if 1e-3 < case.length < 1e3]
    small = [case for case in tame if case.n * (case.m or case.n) * case.d < 250_000]
    one_pair = pytest.mark.xfail(reason="a weight is rounded to bf16, which one pair alone averages with nothing", strict=True)
    return [
        *((MMA, case) for case in CASES if case.d < 129),
        *((WGMMA, replace(case, dtype=F16)) for case in small[::2]),
        *(pytest.param(WGMMA, replace(case, dtype=BF16), marks=one_pair if case.n == case.m == 1 else ()) for case in small),
        *((MMA, replace(case, dtype=dtype)) for dtype in (F16, BF16) for case in small[9::4]),
    ]


@pytest.mark.parametrize(("capability", "case"), contract_cases(), ids=str)
def test_contract(on, capability, case):
    check(on(capability), case, HOST)


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(("samples", "depth"), [(2, 3), (33, 64)])
def test_every_loss(on, monkeypatch, name, dtype, samples, depth):
    backend, row = on(WGMMA), LOSSES[name]
    backend.unusable = lambda device, dtype, depth: None
    monkeypatch.setitem(BACKENDS, "cuda", backend)
    assert_agrees(row, row.on(samples, depth, HOST, dtype), dtype, "cuda")


# A panel is 64 half numbers of the depth. At 8, 72 and 104 a box is wider than what is left of the tensor; at 136 and 192 the last of four
# panels lies wholly outside of it; at 129 rows so do most rows of the last block and tile.
@pytest.mark.parametrize("depth", [8, 64, 72, 104, 128, 136, 192, 256])
@pytest.mark.parametrize("m", [None, 70])
def test_boxes_at_and_outside_the_edges(on, emulated, depth, m):
    case = Case(129, m, d=depth, dtype=BF16 if m else F16, keys="few", rows=SCL if m is None else PSC, scale=-10.0 if m else 10.0)
    check(on(WGMMA), case, HOST)
    assert {"wgmma_forward", "wgmma_backward"} <= set(names(emulated))


# Beyond the registers of one consumer: 5 … 16 panels of 64. Tiles of 32 columns: one, even and odd numbers of them, ragged and whole.
@pytest.mark.parametrize(
    ("n", "m", "depth"),
    [(3, None, 264), (70, None, 512), (64, None, 520), (97, None, 768), (90, None, 776), (33, 150, 1024), (70, 150, 320)],
)
def test_deep_rows_on_hopper(on, emulated, n, m, depth):
    case = Case(n, m, d=depth, dtype=F16 if n % 2 else BF16, keys="few", rows=SCL if m is None else PSC, scale=10.0, own=m is not None)
    check(on(WGMMA, multiprocessors=1), case, HOST)
    assert {"wgmma_deep_forward", "wgmma_deep_backward"} <= set(names(emulated))


# Blocks of 384 rows and tiles of 96 columns, at depth > 128 of 256 and 64: whole and ragged, the diagonal alone, codes of several keys.
TRIANGLES = [(3, 64, "few"), (384, 8, "few"), (500, 128, "one"), (770, 72, "int64"), (1160, 40, "few"), (1544, 8, "few")]
TRIANGLES += [(520, 256, "few"), (770, 136, "int64")]
# Deeper, 128 rows, and 128 columns or at depth > 512 64; 64 of both at depth > 768. 5 panels: the fewest that a tile's exps run over.
TRIANGLES += [(3, 264, "few"), (128, 512, "few"), (300, 320, "one"), (650, 264, "int64"), (385, 512, "int64"), (1160, 264, "few")]
TRIANGLES += [(130, 768, "few"), (520, 520, "few"), (385, 768, "int64"), (200, 776, "int64"), (257, 1024, "few")]


def triangles_in_groups() -> list[tuple]:
    """With the row blocks whose columns' sums are added up (8: all). One block alone has nothing to group; of the rest, those of the most
    blocks of each depth are grouped in every way, the others in two ways by turns."""
    found = []
    for k, (n, depth, keys) in enumerate(TRIANGLES):
        blocks = -(-n // (384 if depth <= 256 else 128))
        groups = (1,) if blocks == 1 else (1, 2, 8) if n == 1160 else (1, (2, 8)[k % 2])
        found += [(n, depth, keys, group) for group in groups]
    return found


@pytest.mark.parametrize(("n", "depth", "keys", "group"), triangles_in_groups())
def test_each_pair_once(on, emulated, monkeypatch, n, depth, keys, group):
    monkeypatch.setenv("FASTSUPCON_TRIANGLE", str(group))
    pairs = problem(Case(n, d=depth, dtype=F16 if n % 3 else BF16, keys=keys, scale=-10.0 if n == 520 else 10.0), HOST)
    if keys == "one":
        pairs = pairs._replace(row_keys=torch.full((n,), 7))
    multiprocessors = 132 if n == 1544 else n % 7 + 1  # so many: one tile to a chunk, and row blocks without any
    backend, line = on(WGMMA, multiprocessors=multiprocessors), Line(all=1, similarity=-1)
    found = backend.forward(pairs, SCL, (), False).rows
    kernel = "wgmma_triangle" if depth <= 256 else "wgmma_deep_triangle"
    assert names(emulated) == ["prepare_forward", kernel, "combine_triangle"]
    exact = reference.forward(pairs._replace(rows=pairs.rows.double()), SCL, (), False).rows
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-6 * n**0.5)
    loss, (kept,) = backend.loss(pairs, SCL, line, False)
    assert torch.equal(kept[: 3 * n].view(3, n), found), "the same bits every time"
    torch.testing.assert_close(loss.double(), reference.line(SCL, exact, line), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("group", "kernel"), [("-1", "wgmma_forward"), ("0", "wgmma_forward"), ("2000000000", "wgmma_triangle")])
def test_triangle_as_named(on, emulated, monkeypatch, group, kernel):
    monkeypatch.setenv("FASTSUPCON_TRIANGLE", group)
    check(on(WGMMA, multiprocessors=3), Case(400, d=8, dtype=BF16, scale=10.0, keys="few"), HOST)
    assert kernel in names(emulated)


def test_triangle_named_by_no_number(on, monkeypatch):
    monkeypatch.setenv("FASTSUPCON_TRIANGLE", "yes")
    with pytest.raises(RuntimeError, match="FASTSUPCON_TRIANGLE=yes is no number"):
        check(on(WGMMA), Case(40, d=8, dtype=BF16, scale=10.0, keys="few"), HOST)


# Whether sums are bounded, only the device knows: a family for each case is launched, and its blocks end at once where it is not its turn.
EITHER = [(None, 8, F16), (None, 64, BF16), (70, 128, F16), (None, 256, BF16), (70, 512, BF16), (None, 768, F16), (70, 776, BF16)]


@pytest.mark.parametrize("scale", [-10.0, 1000.0, math.nan])
@pytest.mark.parametrize(
    ("m", "depth", "dtype", "group"),
    [(*either, group) for either in EITHER for group in ("0", "2") if group == "0" or either[0] is None],  # two sets are no triangle
)
def test_learned_scales_on_hopper(on, emulated, monkeypatch, m, depth, dtype, scale, group):
    """To the bit what the family gives that runs alone where the scale is a number."""
    monkeypatch.setenv("FASTSUPCON_TRIANGLE", group)
    sides = {"rows": SCL} if m is None else {"rows": PSC, "columns": SCL}
    case = Case(129, m, d=depth, dtype=dtype, keys="few", learned=True, scale=scale, own=m is not None, **sides)
    pairs, backend = problem(case, HOST), on(WGMMA, multiprocessors=depth % 7 + 1)
    terms, row_grads, column_grads, gradients = run(backend, pairs, case)
    launched = names(emulated)
    assert sum(name.startswith("wgmma") for name in launched) == sum(name.startswith("mma") for name in launched) == 2
    if math.isfinite(scale):
        check(backend, case, HOST)
    number = pairs._replace(scale=scale)
    names(emulated)
    alone = backend.forward(number, case.rows, case.columns, False)
    for got, want in zip(terms[:2], alone[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    row_side, column_side = Side(case.rows, terms.rows, row_grads), Side(case.columns, terms.columns, column_grads)
    want = backend.backward(number, row_side, column_side, terms.norms, terms.kept, (True, m is not None, False, False))
    assert all(name.startswith("mma") == (abs(scale) != 10.0) for name in names(emulated) if "mma" in name)
    torch.testing.assert_close(gradients.rows, want.rows, rtol=0, atol=0, equal_nan=True)
    if m is not None:
        torch.testing.assert_close(gradients.columns, want.columns, rtol=0, atol=0, equal_nan=True)


AS_THEY_ARE = {
    "bounded": {},
    "scale": {"scale": 900.0},
    "one row": {"long_row": 1e3},
    "one column": {"long_column": 1e3},
    "a far longer row": {"long_row": 1e6},
    "nothing longer than 1": {"length": 1e-3, "scale": 30.0},
}


# What bounds the sums is found before the kernels of any depth: the deep ones are held to one case of either outcome.
@pytest.mark.parametrize(
    ("capability", "m", "depth", "dtype", "what"),
    [
        (*where, what)
        for where in (*((WGMMA, *either) for either in EITHER[:-1]), (MMA, None, 40, F32), (MMA, 70, 72, BF16))
        for what in (AS_THEY_ARE if where[2] <= 256 else ("bounded", "one row"))
        if not (where[3] == F16 and what == "a far longer row") and not (where[1] is None and what == "one column")  # there is none
    ],
)
def test_rows_as_they_are(on, emulated, monkeypatch, capability, m, depth, dtype, what):
    """Their lengths and the scale bound the sums, if neither the scale is large nor a single row or column long."""
    sides = {"rows": SCL} if m is None else {"rows": PSC, "columns": SCL}
    options = {"scale": 2.0, **AS_THEY_ARE[what], **sides}
    case = Case(129, m, d=depth, dtype=dtype, keys="few", learned=m is None, unit=False, own=m is not None, **options)
    backend, pairs = on(capability, multiprocessors=depth % 7 + 1), problem(case, HOST)
    terms, _, _, gradients = run(backend, pairs, case)
    is_bounded, launched = what in ("bounded", "nothing longer than 1"), names(emulated)
    assert terms.norms.tolist() == [is_bounded]
    assert sum(name.startswith("mma") for name in launched) == 2
    assert sum(name.startswith("wgmma") for name in launched) == (2 if capability == WGMMA else 0)
    check(backend, case, HOST)
    if not is_bounded:
        monkeypatch.setenv("FASTSUPCON_CUDA", "mma")
        alone, _, _, expected = run(backend, pairs, case)
        for got, want in zip((*terms, *gradients), (*alone, *expected), strict=True):
            assert torch.equal(got, want) if got is not None else want is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("m", "of"), [(None, "rows"), (70, "rows"), (70, "columns"), (70, "scale")])
def test_what_is_not_finite_is_not_bounded(on, m, value, of):
    case = Case(129, m, d=64, dtype=BF16, keys="few", learned=True, unit=False, rows=("all",))
    pairs, backend = problem(case, HOST), on(WGMMA)
    if of == "scale":
        pairs.scale.fill_(value)
    else:
        getattr(pairs, of)[5, 3] = value
    terms = backend.forward(pairs, ("all",), (), False)
    assert terms.norms.tolist() == [0]
    assert not terms.rows.isfinite().all()


def test_unit_rows_as_they_are(on, monkeypatch):
    """Rows of exactly unit length have the quantities of rows that are brought to it, to the bit, whatever is known before the launch."""
    monkeypatch.setenv("FASTSUPCON_TRIANGLE", "1")
    pairs, backend = problem(Case(200, d=64, dtype=BF16, keys="few", scale=10.0), HOST), on(WGMMA)
    unit = pairs._replace(rows=torch.sign(pairs.rows) / 8)
    terms, want = (backend.forward(of, SCL, (), False) for of in (unit._replace(unit=False), unit))
    assert terms.norms.tolist() == [1]
    assert torch.equal(terms.rows, want.rows)


def test_a_family_named_must_serve_what_a_device_may_find(on, monkeypatch):
    monkeypatch.setenv("FASTSUPCON_CUDA", "wgmma")
    with pytest.raises(RuntimeError, match="FASTSUPCON_CUDA=wgmma"):
        check(on(WGMMA), Case(70, d=64, dtype=BF16, keys="few", learned=True), HOST)


@pytest.mark.parametrize("capability", [MMA, WGMMA])
@pytest.mark.parametrize("scale", [-10.0, -1.0, 0.0])
@pytest.mark.parametrize("m", [None, 41])
def test_scales_that_are_not_positive(on, capability, scale, m):
    check(on(capability), Case(70, m, d=64, dtype=BF16, keys="few", scale=scale, own=m is not None), HOST)


@pytest.mark.parametrize(("dtype", "depth"), [(F32, 260), (BF16, 320), (F16, 1000), (BF16, 1041), (F32, 1100)])
def test_any_depth(on, dtype, depth):
    """Deeper than what a block's registers hold of the result: several blocks share its columns, and panels come through a ring."""
    check(on(MMA), Case(70, 41, d=depth, dtype=dtype, keys="few", rows=PSC, columns=("all",), own=True), HOST)


@pytest.mark.parametrize("capability", [MMA, WGMMA])
@pytest.mark.parametrize(
    "case", [Case(20, 700, d=64, dtype=BF16, keys="few", rows=SCL, columns=SCL), Case(400, d=40, dtype=F16, keys="few")], ids=str
)
def test_splits(on, emulated, capability, case):
    """Few rows: several blocks share their columns, in the forward the last of them puts the sums together."""
    check(on(capability, multiprocessors=64), case, HOST)
    assert any(grid[0] > -(-max(case.n, case.m or 0) // 64) for _, grid in emulated.launched())


@pytest.mark.parametrize(("capability", "dtype"), [(MMA, F32), (MMA, F16), (WGMMA, BF16)])
@pytest.mark.parametrize("loss", ["SCL", "PSC"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("unit", [True, False])
def test_launches_of_a_step(on, emulated, capability, dtype, loss, learned, unit):
    """Five. One more looks at the lengths of rows as they are; two more are there on Hopper where only the device knows whether sums are
    bounded, as a family stands ready for either; and one makes the sums of columns where rows are many."""
    backend = on(capability, multiprocessors=132)
    line = Line(all=1, similarity=-1) if loss == "SCL" else Line(different=1, similarity=-1)
    case = Case(70, None if loss == "SCL" else 10, d=64, dtype=dtype, keys="few", learned=learned, unit=unit, rows=line.names)
    pairs, expected = problem(case, HOST), 5 + (not unit) + 2 * (capability == WGMMA and (learned or not unit))
    emulated.set_dry(True)
    for _ in range(2):
        _, kept = backend.loss(pairs, line.names, line, False)
        backend.loss_backward(pairs, line.names, line, kept, torch.ones(()), (True, loss == "PSC", False, learned))
        launches = names(emulated)
        assert len(launches) == expected, launches
    emulated.set_dry(False)


def dry_grids(on, emulated, capability: int, n: int, m: int | None, depth: int, dtype) -> list:
    """The grids of the tile kernels for a problem whose rows are not there: nothing runs."""
    backend = on(capability, multiprocessors=132)
    emulated.set_dry(True)
    rows = torch.empty(1, depth, dtype=dtype).expand(n, depth)
    columns = None if m is None else torch.empty(1, depth, dtype=dtype).expand(m, depth)
    backend._run = lambda plan, like: plan.run(0, 0, 0)
    terms = backend.forward(Pairs(rows, columns, 10.0, True), ("all",), (), False)
    nothing = Side((), terms.columns, terms.columns)
    backend.torch.empty_like = lambda like: torch.empty(1)
    backend.backward(
        Pairs(rows, columns, 10.0, True),
        Side(("all",), terms.rows, terms.rows),
        nothing,
        terms.norms,
        terms.kept,
        (True, m is not None, False, False),
    )
    emulated.set_dry(False)
    return [grid for name, grid in emulated.launched() if name.startswith(("mma", "wgmma"))]


@pytest.mark.parametrize("capability", [MMA, WGMMA])
def test_more_row_blocks_than_a_grid_has_in_y(on, emulated, capability):
    for x, y, z in dry_grids(on, emulated, capability, 2**24, 10, 64, BF16):
        assert 65_535 < x < 2**31
        assert (y, z) == (1, 1)


@pytest.mark.parametrize("count", [2048, 8192, 16_897, 20_000, 33_000])
def test_the_multiprocessors_are_kept_busy(on, emulated, count):
    """By at least two thirds in every launch, the last wave of blocks included: 132 blocks run at a time."""
    for x, _, _ in dry_grids(on, emulated, WGMMA, count, None, 128, BF16):
        assert x / (132 * -(-x // 132)) > 2 / 3, x


@pytest.mark.parametrize("line", LINES, ids=str)
def test_lines(on, line):
    backend, case = on(MMA), Case(1100, d=8, keys="few", rows=line.names)
    values = torch.rand(len(line.names), case.n)
    values[line.names.index("count")] = torch.arange(case.n) % 4  # and lone rows
    wide = values.double().requires_grad_()
    want = reference.line(line.names, wide, line)
    torch.testing.assert_close(backend.line(line.names, values, line).double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    grad = torch.randn_like(want)
    (expected,) = torch.autograd.grad(want, wide, grad)
    got = backend.line_backward(line.names, values, grad.float(), line).double()
    expected[:, values[-1] == 0] = math.nan if line.lone == "nan" else 0.0
    torch.testing.assert_close(got[:-1], expected[:-1], rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(("capability", "dtype"), [(MMA, F32), (WGMMA, F16)])
@pytest.mark.parametrize("m", [None, 30])
@pytest.mark.parametrize("line", LINES, ids=str)
def test_a_loss_in_one_call_is_its_parts(on, capability, dtype, m, line):
    """To the bit: a forward with its line, and a backward from the line's gradient."""
    backend = on(capability, multiprocessors=16)
    case = Case(90, m, d=24, dtype=dtype, keys="few", learned=m is None, bias=m is not None, rows=line.names)
    pairs, needs = problem(case, HOST), (True, m is not None, m is not None, m is None)
    loss, kept = backend.loss(pairs, line.names, line, False)
    terms = backend.forward(pairs, line.names, (), False)
    want = backend.line(line.names, terms.rows, line)
    assert loss.shape == want.shape
    torch.testing.assert_close(loss, want, rtol=0, atol=0, equal_nan=True)
    grad = torch.rand_like(loss)
    sides = Side(line.names, terms.rows, backend.line_backward(line.names, terms.rows, grad, line)), Side((), terms.columns, terms.columns)
    parts = backend.backward(pairs, *sides, terms.norms, terms.kept, needs)
    for got, want, need in zip(backend.loss_backward(pairs, line.names, line, kept, grad, needs), parts, needs, strict=True):
        assert (got is not None) == need
        if need:
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", [MMA, WGMMA])
def test_columns_of_other_processes(on, capability):
    """A part of the rows against all columns with the whole problem's log-sums and gradients: the whole gradient of those rows."""
    asked = ("all", "different", "similarity", "count")
    whole = problem(Case(90, d=24, keys="few", rows=asked, dtype=F16), HOST)
    backend = on(capability)
    terms = backend.forward(whole, asked, (), False)
    grads = incoming(asked, terms.rows)
    want = backend.backward(
        whole, Side(asked, terms.rows, grads), Side((), terms.columns, terms.columns), terms.norms, terms.kept, (True, False, False, False)
    )
    part = slice(40, 90)
    mine = Pairs(
        whole.rows[part].contiguous(),
        whole.rows,
        whole.scale,
        True,
        None,
        whole.row_keys[part].contiguous(),
        whole.row_keys,
        torch.arange(40, 90),
    )
    part_terms = backend.forward(mine, asked, (), False)
    sides = Side(asked, part_terms.rows, grads[:, part].contiguous()), Side(asked, terms.rows, grads)
    got = backend.backward(mine, *sides, part_terms.norms, part_terms.kept, (True, False, False, False))
    torch.testing.assert_close(got.rows.float(), want.rows[part].float(), rtol=2e-3, atol=2e-5)
    torch.testing.assert_close(part_terms.rows, terms.rows[:, part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("need", range(4))
def test_one_gradient_alone(on, need):
    case = Case(70, 41, rows=("all", "different", "similarity", "count"), columns=("all",), keys="few", own=True, bias=True, learned=True)
    pairs, backend = problem(case, HOST), on(MMA)
    terms, row_grads, column_grads, every = run(backend, pairs, case)
    sides = Side(case.rows, terms.rows, row_grads), Side(case.columns, terms.columns, column_grads)
    for k, got in enumerate(backend.backward(pairs, *sides, terms.norms, terms.kept, tuple(k == need for k in range(4)))):
        assert (got is not None) == (k == need)
        if k == need:
            torch.testing.assert_close(got, every[k], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("capability", [MMA, WGMMA])
@pytest.mark.parametrize("gradient_scale", [65536.0, 1e-6])
def test_half_gradients_of_any_size(on, capability, gradient_scale):
    """GradScaler's factor must not overflow the weights in half precision, nor a mean over many rows underflow them."""
    backend, pairs = on(capability), problem(Case(140, d=64, dtype=F16, keys="few", scale=5.0), HOST)
    terms = backend.forward(pairs, SCL, (), False)
    nothing = Side((), terms.columns, terms.columns)
    grads = incoming(SCL, terms.rows) * gradient_scale
    got = backend.backward(pairs, Side(SCL, terms.rows, grads), nothing, terms.norms, terms.kept, (True, False, False, False)).rows
    wide = pairs._replace(rows=pairs.rows.double())
    exact = reference.backward(
        wide, Side(SCL, terms.rows.double(), grads.double()), nothing, terms.norms, terms.kept, (True, False, False, False)
    ).rows
    floor = 6e-8 * got.numel() ** 0.5  # the smallest half number: what the result itself cannot hold
    assert (got.double() - exact).norm() <= 2 * (exact.to(F16).double() - exact).norm() + 1e-3 * exact.norm() + floor


@pytest.mark.parametrize("capability", [MMA, WGMMA])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_hidden(on, capability, value):
    pairs = problem(Case(70, d=64, dtype=BF16, keys="few"), HOST)
    pairs.rows[3, 2] = value
    assert not on(capability).forward(pairs, ("all",), (), False).rows.isfinite().any()


def test_one_pair_alone_is_exactly_its_similarity(on):
    pairs = problem(Case(2, d=7, keys="few"), HOST)._replace(row_keys=torch.zeros(2, dtype=torch.int64))
    values = on(MMA).forward(pairs, SCL, (), False).rows
    assert torch.equal(values[0], values[1])


def test_the_family_can_be_named(on, emulated, monkeypatch):
    pairs = problem(Case(70, d=64, dtype=BF16, keys="few"), HOST)
    for name, capability in (("mma", WGMMA), ("wgmma", WGMMA)):
        monkeypatch.setenv("FASTSUPCON_CUDA", name)
        on(capability).forward(pairs, SCL, (), False)
        assert f"{name}_forward" in names(emulated)
    with pytest.raises(RuntimeError, match="FASTSUPCON_CUDA=wgmma"):
        on(MMA).forward(pairs, SCL, (), False)


def test_a_driver_that_cannot_load_the_kernels_is_named(emulated, monkeypatch):
    """So that backend="auto" goes on to another, and does not raise in every call."""
    monkeypatch.setattr(cuda, "_C", emulated)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    cuda._driver_unusable.cache_clear()
    assert cuda.unusable(torch.device("cuda", 0), BF16, 64) is None
    emulated.set_driver_fault("the provided PTX was compiled with an unsupported toolchain.")
    assert cuda.unusable(torch.device("cuda", 0), BF16, 64) is None, "asked once per device"
    cuda._driver_unusable.cache_clear()
    assert "unsupported toolchain" in cuda.unusable(torch.device("cuda", 0), BF16, 64)
    emulated.set_driver_fault("")
    cuda._driver_unusable.cache_clear()


def test_tf32_follows_the_matmul_precision(on):
    pairs, backend = problem(Case(70, d=48), HOST), on(MMA)
    exact = reference.forward(pairs._replace(rows=pairs.rows.double()), ("all",), (), False).rows
    errors = {}
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        errors[precision] = (backend.forward(pairs, ("all",), (), False).rows.double() - exact).abs().max().item()
    torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 1e-6
    assert 1e-5 < errors["high"] < 3e-3


# Tensor cores round toward zero when they add. Terms of one sign show it: summed in their accumulators alone, a result comes out too small
# by 2^-25 for each addition on the way, three per step of 8 in single precision.


@pytest.mark.parametrize(("columns", "depth"), [(70, 1024), (1100, 40), (600, 200)])
def test_long_sums_in_single_precision(on, columns, depth):
    """Of logits over the depth, and of gradients over the columns."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.nn.functional.normalize(torch.rand(count, depth, generator=generator)) for count in (20, columns))
    pairs, backend = Pairs(a, b, 20.0), on(MMA, 0)
    wide = Pairs(a.double(), b.double(), 20.0)
    terms, exact = backend.forward(pairs, ("all",), (), False), reference.forward(wide, ("all",), (), False)
    torch.testing.assert_close(terms.rows.double(), exact.rows, rtol=1e-6, atol=0)
    grad = torch.rand(1, 20, generator=generator)
    needs = (True, False, False, False)
    nothing = Side((), terms.columns, terms.columns)
    got = backend.backward(pairs, Side(("all",), exact.rows.float(), grad), nothing, terms.norms, terms.kept, needs)
    want = reference.backward(wide, Side(("all",), exact.rows, grad.double()), nothing, terms.norms, terms.kept, needs)
    assert (got.rows.double() - want.rows).norm() <= 3e-6 * want.rows.norm()


def test_index_maps(emulated):
    """A panel holds each chunk once, as TMA would write it; ldmatrix meets no bank twice; fragments hold each element once."""
    places = [emulated.panel_offset(row, chunk) for row in range(64) for chunk in range(8)]
    assert sorted(places) == list(range(0, 64 * 128, 16))
    assert places == [emulated.tma_offset(row, 16 * chunk) for row in range(64) for chunk in range(8)]
    for pattern in range(3):
        lanes = [emulated.fragment_places(lane)[pattern] for lane in range(32)]
        assert len(set(lanes)) == 32
        for matrix in range(4):  # eight rows of 16 bytes in eight different groups of four banks
            assert len({emulated.panel_offset(*lane) % 128 for lane in lanes[8 * matrix : 8 * matrix + 8]}) == 8
    elements = {emulated.accumulator_place(lane, element) for lane in range(32) for element in range(4)}
    assert elements == {(row, column) for row in range(16) for column in range(8)}
