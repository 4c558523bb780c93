"""What is the C++ CPU kernels' own, beside the contract (test_contract.py): blocks, threads, kept exponentials, ranges, instruction sets.

The process that imports the extension chooses one instruction set for its lifetime, so every other one runs this file and the contract
again in a process of its own (test_other_instruction_sets).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import ALL, PSC, SCL, Case, Truth, check, incoming, problem, run

from fastsupcon.backends import cpu, reference
from fastsupcon.backends._extension import SCALARS
from fastsupcon.problem import Pairs, Side

pytestmark = pytest.mark.skipif(cpu.extension_missing is not None, reason=str(cpu.extension_missing))

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Of several blocks in every instruction set: the self shape, rows more and fewer than columns, with and without what keeps sides in place.
BLOCKS = [
    Case(300, d=40, rows=SCL, keys="few"),
    Case(300, d=40, rows=ALL, keys="few", scale=1000.0),
    Case(300, d=40, rows=("all",), bias=True),
    Case(700, 10, d=30, rows=PSC, keys="few", learned=True),
    Case(10, 700, d=30, rows=PSC, columns=("all",), keys="few"),
    Case(330, 410, d=70, rows=ALL, columns=ALL, keys="few"),
    Case(410, 330, d=70, rows=ALL, columns=("equal",), keys="few", own=True, bias=True),
]


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def outputs(pairs: Pairs, case: Case, keep: bool) -> list[torch.Tensor]:
    """Quantities and gradients."""
    terms = cpu.forward(pairs, case.rows, case.columns, keep)
    sides = (
        Side(case.rows, terms.rows, incoming(case.rows, terms.rows)),
        Side(case.columns, terms.columns, incoming(case.columns, terms.columns)),
    )
    needs = (True, pairs.columns is not None, pairs.bias is not None, isinstance(pairs.scale, torch.Tensor))
    gradients = cpu.backward(pairs, *sides, terms.norms, terms.kept, needs)
    return [terms.rows, terms.columns, *(x for x in gradients if x is not None)]


def same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_several_blocks(case, dtype):
    check(cpu, replace(case, dtype=dtype), CPU)


@pytest.mark.parametrize(("dtype", "depth", "keep"), [(torch.float32, 160, False), (torch.float16, 400, True)], ids=["anew", "kept"])
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case, dtype, depth, keep):
    pairs = problem(replace(case, d=depth, dtype=dtype), CPU)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(outputs(pairs, case, keep))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [replace(case, d=400) for case in BLOCKS] + [Case(3, keys="few")], ids=str)
def test_kept_exponentials_are_those_that_are_computed_anew(case, dtype):
    pairs = problem(replace(case, dtype=dtype), CPU)
    assert cpu.kept_size(*pairs.shape, pairs.columns is None) > 0
    assert same_bits(outputs(pairs, case, True), outputs(pairs, case, False))


@pytest.mark.parametrize("rows, columns, depth", [(256, 256, 128), (1024, 1000, 128), (1024, 1024, 128), (2048, 2048, 768)])
def test_exponentials_of_small_or_wide_batches_are_kept(rows, columns, depth):
    assert 0 < cpu.kept_size(rows, columns, depth, False) <= 2 * (rows + columns) * depth + 2**20
    if rows == columns:
        assert 0 < cpu.kept_size(rows, rows, depth, True) <= 2 * rows * depth + 2**20


@pytest.mark.parametrize("self_shape", [True, False])
def test_no_more_is_kept_than_twice_what_rows_and_columns_have_and_a_million(self_shape):
    assert cpu.kept_size(4096, 4096, 128, self_shape) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [10.0, 1000.0])
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_what_is_not_finite_reaches_the_quantities_of_its_row(case, scale, bad):
    pairs = problem(replace(case, scale=scale), CPU)
    pairs.rows[case.n // 2, 5] = bad
    terms = cpu.forward(pairs, case.rows, case.columns, False)
    for name, value in zip(case.rows, terms.rows, strict=True):
        assert name == "count" or not value[case.n // 2].isfinite()
    if case.m is None:
        assert not terms.rows[0].isfinite().any()


@pytest.mark.parametrize("payload", [0x7FC00001, 0x7F800001, 0xFFFFFFFF - (1 << 32)])
@pytest.mark.parametrize("scale", [10.0, 1000.0])
def test_a_nan_of_any_bits_is_kept(payload, scale):
    pairs = problem(Case(50, d=8, scale=scale), CPU)
    pairs.rows.view(torch.int32)[20, 3] = payload
    assert cpu.forward(pairs, ("all",), (), False).rows.isnan().all()


def test_a_column_of_no_prior_is_left_out():
    pairs = problem(Case(40, 90, bias=True), CPU)
    pairs.bias[::2] = -math.inf
    terms = cpu.forward(pairs, ("all",), (), False)
    others = pairs._replace(columns=pairs.columns[1::2].contiguous(), bias=pairs.bias[1::2].contiguous())
    torch.testing.assert_close(terms.rows, cpu.forward(others, ("all",), (), False).rows)
    sides = Side(("all",), terms.rows, torch.ones_like(terms.rows)), Side((), terms.columns, terms.columns)
    _, columns, bias, _ = cpu.backward(pairs, *sides, terms.norms, terms.kept, (True, True, True, False))
    assert not columns[::2].any() and not bias[::2].any() and columns[1::2].any()


def test_an_infinite_logit_wins_in_whatever_block_of_the_columns():
    for where in (0, 1000, 1999):
        bias = torch.zeros(2000)
        bias[where] = math.inf
        pairs = Pairs(torch.ones(5, 1), torch.full((2000, 1), 1000.0), bias=bias)
        assert cpu.forward(pairs, ("all",), (), False).rows.tolist() == [[math.inf] * 5]


def test_rows_of_any_norm_share_the_shift_of_their_product():
    """Rows of norm 1e4 against columns of norm 1e-4, and the converse, have the logits of unit rows; also where their squares vanish."""
    case = Case(300, 70, d=24, rows=("all",), unit=False)
    plain = problem(case, CPU)
    exact = run(reference, plain._replace(rows=plain.rows.double(), columns=plain.columns.double()), case)
    for factor, rest in ((1e4, 1.0), (1e-4, 1.0), (1e-22, 1e-4), (1e18, 1e3)):
        pairs = plain._replace(rows=plain.rows * factor, columns=plain.columns / factor * rest, scale=case.scale / rest)
        terms, _, _, gradients = run(cpu, pairs, case)
        # products below 2^-126 have fewer bits
        torch.testing.assert_close(terms.rows.double(), exact[0].rows, rtol=2e-5, atol=2e-5)
        for got, want, size in zip(gradients[:2], exact[3][:2], (factor, rest / factor), strict=True):
            torch.testing.assert_close(got.double() * size, want, rtol=1e-3, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("magnitude", [2e38, 65536.0, 1e30, 1e-30])
@pytest.mark.parametrize("scale", [1.0, 10.0, 42.0, 1000.0])  # one shift, its edge, running maxima
@pytest.mark.parametrize("m", [None, 9])
def test_gradients_of_any_magnitude(m, scale, magnitude):
    if magnitude * scale > 2e38:
        pytest.skip("the result is no fp32 number")
    case = Case(80, m, d=24, scale=scale, rows=SCL, keys="few", unit=True)
    pairs = problem(case, CPU)
    pairs.rows[:40] = -pairs.rows[40:]  # opposite rows: the smallest log-sum that the shift allows
    truth = Truth(pairs, case)
    terms = cpu.forward(pairs, case.rows, (), False)
    grads = incoming(case.rows, terms.rows) / 4
    sides = Side(case.rows, terms.rows, grads * magnitude), Side((), terms.columns, terms.columns)
    got = cpu.backward(pairs, *sides, terms.norms, terms.kept, (True, m is not None, False, False))
    for mine, want in zip(got[:2], truth.gradients(grads, terms.columns)[:2], strict=True):
        if mine is not None:
            assert float((mine.double() / magnitude - want).norm() / want.norm()) < 2e-6 * max(scale, 1)


def test_opposite_rows_at_the_edge_of_the_one_shift():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    for scale in (41.0, 42.7, 43.0, 44.0):
        values = cpu.forward(Pairs(rows, scale=scale, unit=True), ("all",), (), False).rows
        torch.testing.assert_close(values[0, :1], torch.tensor([-scale + math.log(2)]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_micro_kernel_counts_its_multiply_adds(dtype):
    """The benchmarks' measure of a core: rows x vectors x lanes x steps, a multiple of every instruction set's smallest group."""
    once = cpu._C.cpu.micro_kernel(SCALARS[dtype], 1, 1)
    assert once % (4 * 2 * 2 * 96) == 0 and once > 0
    assert cpu._C.cpu.micro_kernel(SCALARS[dtype], 7, 3) == 21 * once


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=600
    )


def test_an_unknown_instruction_set_is_an_error():
    done = _python("-c", "from fastsupcon import _C; _C.cpu.instruction_set()", FASTSUPCON_CPU="mmx")
    assert done.returncode != 0
    assert "FASTSUPCON_CPU=mmx" in done.stderr and "generic" in done.stderr


def test_the_environment_chose_this_instruction_set():
    chosen = os.environ.get("FASTSUPCON_CPU")
    assert cpu._C.cpu.instruction_set() == (chosen or cpu._C.cpu.instruction_sets()[0])


@pytest.mark.long
@pytest.mark.skipif("FASTSUPCON_CPU" in os.environ, reason="runs in the process that no instruction set was forced on")
@pytest.mark.parametrize("name", [] if cpu.extension_missing else cpu._C.cpu.instruction_sets()[1:])
def test_other_instruction_sets(name):
    contract = str(Path(__file__).with_name("test_contract.py"))
    done = _python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, contract, "-k", "cpu", FASTSUPCON_CPU=name)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
