"""What the contract (test_contract.py) does not ask of the Triton kernels: how many launches a step is, gradients of any size, splits.

On a GPU, or else in Triton's interpreter (conftest.py). That of Triton 3.6 needs NumPy < 2.4; that of Triton 3.7 and newer takes any.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from contract import Case, check, check_loss, problem, run
from torch.utils._python_dispatch import TorchDispatchMode

from fastsupcon.backends import reference, triton
from fastsupcon.backends.triton import launch, plans
from fastsupcon.problem import Line, Side

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNUSABLE = triton.unusable(DEVICE, torch.float32, 8)
pytestmark = pytest.mark.skipif(UNUSABLE is not None, reason=f"triton: {UNUSABLE}")

SCL, PSC = ("all", "similarity", "count"), ("different", "similarity", "count")


class Allocations(TorchDispatchMode):
    """Counts allocations, and refuses every operator but these and views, which launch nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "empty" in func.overloadpacket.__name__
        assert func.overloadpacket.__name__ in ("empty", "new_empty", "empty_like", "slice", "view", "detach"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [2, 256, 1024, 4096, 20000, 65536])
@pytest.mark.parametrize("m", [0, 10, 100, 1000])
def test_launches_of_a_step(dtype, n, m):
    """As planned for a GPU of 132 multiprocessors: three launches forward, one or two backward; memory for the loss, what it keeps, scratch
    and gradients."""
    from triton_ahead import Form, recorded, step

    gpu = triton.Gpu("hopper", 132, ("tf32x3", "tf32x3"))
    with recorded(gpu) as launches, Allocations() as allocations:
        step(Form(n, m, PSC if m else SCL), dtype, 128)
    names = [kernel.__name__ for kernel, _ in launches]
    assert names[:3] == ["rows_kernel", "forward_kernel", "loss_kernel"]
    assert names[3:] in (["gradient_kernel"], ["gradient_kernel", "finish_kernel"])
    inputs, outputs = (5, 2) if m else (3, 1)
    assert allocations.count <= inputs + 3 + 1 + outputs


class Compiled:
    """A kernel that notes what it is launched with."""

    def __init__(self, notes):
        self.notes = notes

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.notes.append((grid, arguments, stream))


class Kernel:
    """What launch.py knows of a jitted function; an ordinary launch notes the addresses of its arguments."""

    arg_names = ("a_ptr", "b_ptr", "n", "scale", "none_ptr", "BLOCK")
    params = tuple(SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in arg_names)

    def __init__(self):
        self.pre_run_hooks, self.fn, self.ordinary, self.kept = [], object(), [], []

    def __getitem__(self, grid):
        def launch(num_warps, **named):
            values = [named[name] for name in self.arg_names]
            self.ordinary.append((grid, tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values), 7))
            return SimpleNamespace(__getitem__=Compiled(self.kept).__getitem__)  # of AsyncCompileMode's, only attributes are the kernel's

        return launch


def test_kept_launches_are_the_ordinary_ones(monkeypatch):
    """Launches after the first of a plan, and the first of a plan like another, hand the compiled kernel the same arguments."""
    monkeypatch.setattr(launch, "_keeps", lambda device: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    kernel, scratch = Kernel(), launch.Buffer("scratch")
    scratch.take(3)
    place = scratch.take(8, torch.int64)
    values = {"a": torch.zeros(16), "scale": 0.5, "unused": None, "scratch": scratch.empty(torch.zeros(1))}

    def run(n, **changed):
        arguments = {"b_ptr": place.after(1), "a_ptr": launch.At("a", torch.float32), "none_ptr": None, "BLOCK": 16}
        made = launch.Launch(kernel, (n, 2), {**arguments, "n": n, "scale": launch.Number("scale")}, num_warps=4)
        plan = launch.Plan([made], scratch)
        for _ in range(2):
            plan.run({**values, **changed}, torch.device("cpu"))

    run(3)
    arguments = values["a"].data_ptr(), values["scratch"].data_ptr() + place.offset + 8, 3, 0.5, None, 16
    assert kernel.kept == kernel.ordinary == [((3, 2, 1), arguments, 7)]
    run(4, scale=2.0)
    assert len(kernel.ordinary) == 1
    assert [arguments[2:4] for _, arguments, _ in kernel.kept[1:]] == [(4, 2.0)] * 2
    off = torch.zeros(17)[1:]
    run(3, a=off)  # 4 bytes off: Triton compiles another kernel, which is kept beside the first
    assert len(kernel.ordinary) == 2 and kernel.kept[3] == kernel.ordinary[1]
    assert kernel.kept[3][1][0] == off.data_ptr()
    run(5, a=off)
    assert len(kernel.kept) == 6 and len(kernel.ordinary) == 2
    kernel.pre_run_hooks.append(print)
    run(3)
    assert len(kernel.kept) == 6 and len(kernel.ordinary) == 4


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs TRITON_INTERPRET=1, which conftest.py sets without a GPU")
def test_nothing_is_kept_in_the_interpreter():
    """It serves tensors on a GPU too, and compiles nothing."""
    assert not launch._keeps(torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Case(20, d=300, keys="few"), Case(9, 20, d=300, rows=PSC, keys="few", unit=False)], ids=str)
def test_rows_longer_than_a_tile(case, dtype):
    check(triton, Case(**{**vars(case), "dtype": dtype}), DEVICE)


SPLIT_CASES = [
    Case(70, keys="few"),
    Case(70, 90, rows=SCL, columns=PSC, keys="few", own=True, learned=True, bias=True),
    Case(70, rows=("different", "equal"), keys="few", bias=True),
]


@contextlib.contextmanager
def planned(per_split):
    """With so many tiles per split, in plans of one's own."""
    caches = plans.forward_plan, plans.backward_plan, plans.loss_plan, plans.loss_backward_plan
    with mock.patch.object(plans, "_tiles_per_split", per_split):
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("line, split", [(Line(all=1, similarity=-1, lone="skip"), True), (Line(different=1, similarity=-1), False)])
def test_a_loss_of_many_programs(line, split):
    """Whichever is the last to be done adds what all of them found. Splits share the 1024 rows that a program has: 8 splits here, or 1."""
    with planned((lambda owners, tiles, slots: 1) if split else (lambda owners, tiles, slots: tiles)):
        check_loss(triton, Case(450 if split else 1100, d=8, keys="few", rows=line.names), line, DEVICE)


@pytest.mark.parametrize("needs", [None, (True, False, False, False), (False, True, True, False)], ids=["all", "rows", "columns"])
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_splits_change_nothing(case, needs):
    pairs = problem(case, DEVICE)
    if needs == (False, True, True, False) and case.m is None:
        needs = (False, False, case.bias, False)
    results = []
    for per_split in (lambda owners, tiles, slots: tiles, lambda owners, tiles, slots: 1):
        with planned(per_split):
            terms, row_grads, column_grads, gradients = run(triton, pairs, case)
            if needs is not None and any(needs):
                sides = Side(case.rows, terms.rows, row_grads), Side(case.columns, terms.columns, column_grads)
                gradients = triton.backward(pairs, *sides, terms.norms, terms.kept, needs)
        results.append((*terms[:2], *gradients))
    for x, y in zip(*results, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
def test_keys_that_no_float_holds(wide):
    """Among the columns, and among the rows: only if these have none are codes compared in place of keys."""
    some = torch.tensor([0, -1, 2**24, -(2**24), 2**24 + 1, -(2**24) - 1, 2**32, -(2**63)], device=DEVICE)
    case = Case(40, 200, keys="few", rows=("all", "different", "equal", "similarity", "count"))
    pairs = problem(case, DEVICE)
    at = torch.arange(200, device=DEVICE)
    pairs = pairs._replace(row_keys=some[at[:40] % (8 if wide else 4)], column_keys=some[at % 8])
    (ours, *_, mine), (theirs, *_, right) = (run(backend, pairs, case) for backend in (triton, reference))
    assert torch.equal(ours.rows[4], theirs.rows[4])
    torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.rows, right.rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [65536.0, 2.0**-30])
@pytest.mark.parametrize("scale", [10.0, 100.0])  # bounded, running
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_scale(dtype, scale, factor):
    """A loss scaled for mixed precision, or a tiny one: the gradient scales along, and does not lose digits in the tile."""
    case = Case(70, dtype=dtype, scale=scale, keys="few", length=20.0)
    pairs = problem(case, DEVICE)
    terms, row_grads, column_grads, _ = run(triton, pairs, case)
    columns = Side((), terms.columns, column_grads)
    needs = (True, False, False, False)
    got = triton.backward(pairs, Side(case.rows, terms.rows, row_grads * factor), columns, terms.norms, terms.kept, needs).rows
    wide = pairs._replace(rows=pairs.rows.double())
    values, grads = terms.rows.double(), row_grads.double() * factor
    want = reference.backward(wide, Side(case.rows, values, grads), columns, terms.norms.double(), terms.kept, needs).rows
    error = (got.double() - want).norm() / want.norm()
    floor = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * want.numel() ** 0.5 / want.norm()  # of what fp16 can hold at all
    assert error <= torch.finfo(dtype).eps / 2 + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("unit", [True, False])
def test_nan_is_not_hidden(dtype, unit):
    case = Case(40, d=8, dtype=dtype, unit=unit, keys="few")
    pairs = problem(case, DEVICE)
    pairs.rows[17, 3] = torch.nan
    terms, _, _, gradients = run(triton, pairs, case)
    assert terms.rows[0].isnan().all() and gradients.rows.isnan().all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU needs no interpreter")
@pytest.mark.parametrize(
    "triton_version, numpy_version, fine", [("3.6.0", "2.4.1", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.1", True)]
)
def test_interpreter_and_numpy(monkeypatch, triton_version, numpy_version, fine):
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    reason = triton.unusable(torch.device("cpu"), torch.float32, 8)
    assert reason is None if fine else "needs NumPy < 2.4" in reason
