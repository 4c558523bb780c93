"""The C++ CPU kernels against the float64 reference, in every instruction set this processor has.

The process that imports the extension chooses one set for its lifetime, so every other set runs this file again in a process of its own
(test_other_instruction_sets).
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from fastsupcon.backends import cpu, reference
from fastsupcon.backends._dtypes import sum_dtype
from fastsupcon.backends._extension import SCALARS

pytestmark = pytest.mark.skipif(cpu.extension_missing is not None, reason=str(cpu.extension_missing))

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RAGGED = [(1, 3), (2, 1), (63, 64), (65, 129), (257, 100), (1000, 128), (257, 512)]  # rows, depth
THREADS = (1, 2, 3, 5)


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _rows(count: int, depth: int, dtype: torch.dtype, *, unit: bool = True, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, depth, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (normalize(rows) if unit else rows).to(dtype)


def _grad(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(sum_dtype(dtype))


def _error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error relative to the largest exact value."""
    assert actual.isfinite().all() and exact.isfinite().all()
    return float((actual.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-300))


def _self(z: torch.Tensor, grad: torch.Tensor, scale: float, unit: bool, backend=cpu):
    lse = backend.self_forward(z, scale, unit)
    return lse, backend.self_backward(z, lse, grad, scale, unit)


def _assert_as_exact_as_eager(ours, eager, exact, dtype: torch.dtype, largest_logit: float = 0) -> None:
    """The project's rule: at most twice the error of plain PyTorch in the same dtype, plus a small term, and the last bit of a logit."""
    # float64: raw rows at scale 1000 have logits of 1e5, whose last bit is 1e-11. bf16 dot products round each weight too (2^-9), and a
    # cancelling sum of few terms shows it; "plain" here rounds the result alone.
    pairs = cpu._C.cpu.instruction_set() == "avx512_bf16"
    slack = {torch.float32: 5e-7, torch.float64: 2e-12, torch.float16: 2e-4, torch.bfloat16: 1e-2 if pairs else 2e-3}[dtype]
    slack += largest_logit * torch.finfo(sum_dtype(dtype)).eps
    for name, mine, plain, true in zip(("lse", "da", "db", "dbias"), ours, eager, exact, strict=False):
        if true is not None and true.numel():
            assert _error(mine, true) <= 2 * _error(plain, true) + slack, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit, scale", [(True, 10.0), (True, 1000.0), (False, 1.0), (False, 1000.0)])
@pytest.mark.parametrize("count, depth", RAGGED)
def test_self(count, depth, unit, scale, dtype):
    z, grad = _rows(count, depth, dtype, unit=unit), _grad(count, dtype)
    lse, dz = _self(z, grad, scale, unit)
    if count == 1:
        assert lse.tolist() == [-math.inf] and not dz.any()
        return
    # both are given the rows that the dtype holds; eager and ours then sum in sum_dtype(dtype)
    exact = _self(z.double(), grad.double(), scale, unit, reference)
    _assert_as_exact_as_eager((lse, dz), _self(z, grad, scale, unit, reference), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["none", "skip", "labels"])
@pytest.mark.parametrize("biased, scale", [(False, 8.0), (False, 1000.0), (True, 8.0)])  # one shift for all, running maxima twice
@pytest.mark.parametrize("rows, columns, depth", [(1, 1, 1), (63, 10, 64), (257, 65, 3), (65, 1000, 129), (2, 2000, 100), (1000, 257, 128)])
def test_cross(rows, columns, depth, biased, scale, rule, dtype):
    generator = torch.Generator().manual_seed(3)
    a, b, grad = _rows(rows, depth, dtype), _rows(columns, depth, dtype, seed=1), _grad(rows, dtype)
    bias = torch.randn(columns, dtype=torch.float64, generator=generator).to(sum_dtype(dtype)) if biased else None
    skip = row_labels = column_labels = None
    if rule == "skip":
        skip = torch.randint(-1, columns, (rows,), generator=generator)
    elif rule == "labels":  # differ in the high half alone: 64 bits count
        row_labels, column_labels = (torch.randint(-2, 3, (n,), generator=generator) << 32 for n in (rows, columns))
    run = functools.partial(_cross, skip=skip, row_labels=row_labels, column_labels=column_labels, scale=scale, needs=(True, True, biased))
    ours = run(cpu, a, b, bias, grad)
    exact = run(reference, a.double(), b.double(), bias.double() if biased else None, grad.double())
    empty = exact[0] == -math.inf
    assert torch.equal(ours[0] == -math.inf, empty)
    assert not ours[1][empty].any()
    eager = run(reference, a, b, bias, grad)
    keep = ~empty
    drop_empty = [(lse[keep], *rest) for lse, *rest in (ours, eager, exact)]
    _assert_as_exact_as_eager(*drop_empty, dtype, largest_logit=scale)


def _cross(backend, a, b, bias, grad, *, skip, row_labels, column_labels, scale, needs=(True, True, True)):
    lse = backend.cross_forward(a, b, bias, skip, row_labels, column_labels, scale)
    return lse, *backend.cross_backward(a, b, bias, skip, row_labels, column_labels, lse, grad, scale, needs)


def test_cross_computes_only_what_is_needed():
    a, b, bias, grad = _rows(70, 20, torch.float32), _rows(300, 20, torch.float32, seed=1), torch.zeros(300), _grad(70, torch.float32)
    run = functools.partial(_cross, cpu, a, b, bias, grad, skip=None, row_labels=None, column_labels=None, scale=5.0)
    full = run()[1:]
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        for wanted, part, whole in zip(needs, run(needs=needs)[1:], full, strict=True):
            assert torch.equal(part, whole) if wanted else part is None


def test_a_column_of_no_prior_is_left_out():
    a, b = _rows(40, 16, torch.float32), _rows(90, 16, torch.float32, seed=1)
    bias = torch.zeros(90)
    bias[::2] = -math.inf
    lse, _, db, dbias = _cross(cpu, a, b, bias, torch.ones(40), skip=None, row_labels=None, column_labels=None, scale=5.0)
    torch.testing.assert_close(lse, cpu.cross_forward(a, b[1::2].contiguous(), None, None, None, None, 5.0))
    assert not db[::2].any() and not dbias[::2].any() and db[1::2].any()


@pytest.mark.parametrize("unit, scale", [(True, 10.0), (True, 1000.0), (False, 1.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("count", [2, 70, 300])
def test_nan_and_inf_reach_every_row(count, bad, unit, scale):
    z = _rows(count, 33, torch.float32)
    z[count // 2, 5] = bad
    lse = cpu.self_forward(z, scale, unit)
    touched = ~reference.self_forward(z, scale, unit).isfinite()  # an inf that makes s_ij −inf only drops that pair
    assert touched.sum() > count // 3
    assert not lse[touched].isfinite().any()
    touched = ~reference.cross_forward(z, z, None, None, None, None, scale).isfinite()
    assert not cpu.cross_forward(z, z, None, None, None, None, scale)[touched].isfinite().any()
    if math.isnan(bad):
        assert lse.isnan().all()
        assert cpu.self_backward(z, lse, torch.ones(count), scale, unit).isnan().all()


@pytest.mark.parametrize("payload", [0x7FC00001, 0x7F800001, 0xFFFFFFFF - (1 << 32)])
def test_a_nan_of_any_bits_is_kept(payload):
    z = _rows(50, 8, torch.float32)
    z.view(torch.int32)[20, 3] = payload
    for unit, scale in ((True, 10.0), (True, 1000.0)):
        assert cpu.self_forward(z, scale, unit).isnan().all()


def test_rows_of_any_norm_share_the_shift_of_their_product():
    """Rows of norm 1e4 against columns of norm 1e-4, and the converse, have the logits of unit rows; also where their squares vanish."""
    a, b, grad = _rows(300, 24, torch.float32), _rows(70, 24, torch.float32, seed=1), _grad(300, torch.float32)
    run = functools.partial(_cross, bias=None, grad=grad, skip=None, row_labels=None, column_labels=None, needs=(True, True, False))
    exact = run(reference, a.double(), b.double(), grad=grad.double(), scale=10.0)
    for factor, rest in ((1e4, 1.0), (1e-4, 1.0), (1e-22, 1e-4), (1e18, 1e3)):
        lse, da, db, _ = run(cpu, a * factor, b / factor * rest, scale=10.0 / rest)
        for mine, true in zip((lse, da.double() * factor, db.double() / factor * rest), exact, strict=False):
            assert _error(mine, true) < 2e-5  # the products below 2^-126 have fewer bits


@pytest.mark.parametrize("largest, scale", [(2e38, 1.0), (3e37, 10.0)])
def test_the_largest_gradients_do_not_overflow_on_the_way(largest, scale):
    a, b, grad = _rows(6, 4, torch.float32), _rows(5, 4, torch.float32, seed=1), torch.zeros(6)
    a[:, 3] = b[:, 3] = 0
    grad[0] = largest
    run = functools.partial(_cross, bias=None, skip=None, row_labels=None, column_labels=None, scale=scale, needs=(True, True, False))
    exact = run(reference, a.double(), b.double(), grad=grad.double())
    for mine, true in zip(run(cpu, a, b, grad=grad)[1:3], exact[1:3], strict=True):
        assert _error(mine, true) < 2e-6
    exact = _self(a.double(), grad.double(), scale, True, reference)[1]
    assert _error(_self(a, grad, scale, True)[1], exact) < 2e-6


def test_an_infinite_logit_wins_in_whatever_part_of_the_columns():
    b = torch.full((2000, 1), 1000.0)
    for where in (0, 1000, 1999):
        bias = torch.zeros(2000)
        bias[where] = math.inf
        assert cpu.cross_forward(torch.ones(1, 1), b, bias, None, None, None, 1.0).tolist() == [math.inf]


@pytest.mark.parametrize("magnitude", [65536.0, 1e30, 1e-30])
@pytest.mark.parametrize("scale", [10.0, 42.0, 1000.0])  # fixed shift, its edge, running maximum
def test_gradients_of_any_magnitude(scale, magnitude):
    z = _rows(80, 24, torch.float32)
    z[:40] = -z[40:]  # opposite rows: the smallest lse that the shift allows
    grad = _grad(80, torch.float32)
    exact = _self(z.double(), grad.double(), scale, True, reference)[1]
    lse = cpu.self_forward(z, scale, True)
    assert _error(cpu.self_backward(z, lse, grad * magnitude, scale, True).double() / magnitude, exact) < 1e-3 * scale / 10
    run = functools.partial(_cross, bias=None, skip=None, row_labels=None, column_labels=None, scale=scale, needs=(True, True, False))
    exact = run(reference, z.double(), z[:9].double(), grad=grad.double())[1:3]
    for mine, true in zip(run(cpu, z, z[:9], grad=grad * magnitude)[1:3], exact, strict=True):
        assert _error(mine.double() / magnitude, true) < 1e-3 * scale / 10


def test_opposite_rows_at_the_edge_of_the_fixed_shift():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for scale in (41.0, 42.7, 43.0, 44.0):
        torch.testing.assert_close(cpu.self_forward(z, scale, True), torch.tensor([-scale, -scale]), rtol=1e-6, atol=0)
        _, dz = _self(z, torch.full((2,), 65536.0), scale, True)
        torch.testing.assert_close(dz, 2 * 65536.0 * scale * z.flip(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(cpu.cross_forward(z, -z, None, torch.tensor([1, 0]), None, None, scale), torch.tensor([-scale, -scale]))


def _bits(*tensors):
    return [t.contiguous().view(torch.uint8).tolist() for t in tensors if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count, scale", [(300, 10.0), (1100, 10.0), (700, 1000.0)])
def test_self_is_bitwise_equal_for_any_number_of_threads(count, scale, dtype):
    z, grad = _rows(count, 96, dtype), _grad(count, dtype)
    results = []
    for threads in (*THREADS, 1, 5):
        torch.set_num_threads(threads)
        results.append(_bits(*_self(z, grad, scale, True)))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows, columns", [(1500, 10), (10, 3000), (700, 900), (1800, 1900)])
def test_cross_is_bitwise_equal_for_any_number_of_threads(rows, columns, biased):
    bias = torch.zeros(columns) if biased else None
    a, b, grad = _rows(rows, 160, torch.float32), _rows(columns, 160, torch.float32, seed=1), _grad(rows, torch.float32)
    results = []
    for threads in (*THREADS, 1, 5):
        torch.set_num_threads(threads)
        run = functools.partial(_cross, cpu, a, b, bias, grad, skip=None, row_labels=None, column_labels=None, scale=10.0)
        results.append(_bits(*run(needs=(True, True, biased))))
    assert all(result == results[0] for result in results)


def test_several_python_threads_at_once():
    torch.set_num_threads(2)
    z, grad = _rows(500, 128, torch.float32), _grad(500, torch.float32)
    expected = _bits(*_self(z, grad, 10.0, True))
    results: list = []
    workers = [threading.Thread(target=lambda: results.extend([_bits(*_self(z, grad, 10.0, True)) for _ in range(4)])) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [expected] * 16


_AFTER_FORK = """
import os, torch
from fastsupcon.backends import cpu
torch.set_num_threads(3)
z = torch.nn.functional.normalize(torch.randn(900, 128), dim=1)
before = cpu.self_forward(z, 10.0, True)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(cpu.self_forward(z, 10.0, True), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_still_works():
    done = _python("-c", _AFTER_FORK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_micro_kernel_counts_its_multiply_adds(dtype):
    """The benchmarks' measure of a core: rows x vectors x lanes x steps, a multiple of every instruction set's smallest group."""
    once = cpu._C.cpu.micro_kernel(SCALARS[dtype], 1, 1)
    assert once % (4 * 2 * 2 * 96) == 0 and once > 0
    assert cpu._C.cpu.micro_kernel(SCALARS[dtype], 7, 3) == 21 * once


def test_an_unknown_instruction_set_is_an_error():
    done = _python("-c", "from fastsupcon import _C; _C.cpu.instruction_set()", FASTSUPCON_CPU="mmx")
    assert done.returncode != 0
    assert "FASTSUPCON_CPU=mmx" in done.stderr and "generic" in done.stderr


def test_the_environment_chose_this_instruction_set():
    chosen = os.environ.get("FASTSUPCON_CPU")
    assert cpu._C.cpu.instruction_set() == (chosen or cpu._C.cpu.instruction_sets()[0])


@pytest.mark.skipif("FASTSUPCON_CPU" in os.environ, reason="runs in the process that no instruction set was forced on")
@pytest.mark.parametrize("name", [] if cpu.extension_missing else cpu._C.cpu.instruction_sets()[1:])
def test_other_instruction_sets(name):
    tests = (__file__, str(Path(__file__).with_name("test_rows.py")))
    done = _python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, FASTSUPCON_CPU=name)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
