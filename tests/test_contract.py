"""Every backend against float64 definitions, value and gradient (contract.py)."""

from dataclasses import replace

import pytest
import torch
from contract import CASES, LINES, Case, cases, check, check_loss, incoming, problem, run

from fastsupcon.backends import BACKENDS, reference
from fastsupcon.problem import Pairs, Side


def unusable(name: str, case: Case, device) -> str | None:
    return BACKENDS[name].unusable(device, case.dtype, case.d)


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("name", list(BACKENDS))
def test_values_and_gradients(name, case, device):
    if reason := unusable(name, case, device):
        pytest.skip(f"{name}: {reason}")
    check(BACKENDS[name], case, device)


@pytest.mark.parametrize("line", LINES, ids=str)
def test_lines(backend, line, device):
    if not hasattr(BACKENDS[backend], "line"):
        pytest.skip(f"{backend} makes a loss at once: test_losses")
    case = Case(70, keys="few", rows=line.names)
    module, values = BACKENDS[backend], reference.forward(problem(case, device), line.names, (), False).rows
    values[line.names.index("count"), :3] = 0  # lone rows
    wide = values.double().requires_grad_()
    want = reference.line(line.names, wide, line)
    torch.testing.assert_close(module.line(line.names, values, line).double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    grad = torch.randn_like(want)
    (expected,) = torch.autograd.grad(want, wide, grad)
    if line.lone == "nan":
        expected[:, :3] = torch.nan
    got = module.line_backward(line.names, values, grad.to(values.dtype), line).double()
    count = line.names.index("count")
    got[count] = expected[count] = 0
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, equal_nan=True)


LOSS_CASES = [
    Case(70, d=24),
    Case(70, d=24, learned=True, dtype=torch.bfloat16),
    Case(150, d=24, unit=False, scale=20.0),
    Case(70, d=24, dtype=torch.float16),
    Case(70, d=24, bias=True, learned=True),
    Case(70, 41, d=24),
    Case(33, 200, d=24, own=True, scale=100.0, dtype=torch.float16),
    Case(70, 41, d=24, dtype=torch.float64),
]


def spare_the_interpreter(backend, case, line, device):
    """The first case meets every line. Of the others, one of two each with fp16 rows, two sets, unbounded sums and a learned scale meets
    the odd lines and the other the even ones: those are what a loss's kernel is compiled for, and together they meet every line too."""
    at = LOSS_CASES.index(case)
    is_chosen = at == 0 or LINES.index(line) % 2 == (at in (1, 2, 3, 5))
    if backend == "triton" and device.type == "cpu" and not is_chosen:
        pytest.skip("interpreted: every second line of a case")


@pytest.mark.parametrize("line", LINES, ids=str)
@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_losses(backend, case, line, device):
    """Of the backends that make a loss and its gradient at once, against float64. Rows 0, 1 and 2 are lone."""
    spare_the_interpreter(backend, case, line, device)
    module = BACKENDS[backend]
    if not hasattr(module, "loss"):
        pytest.skip(f"{backend} makes a loss from its terms: test_lines")
    if reason := unusable(backend, case, device):
        pytest.skip(f"{backend}: {reason}")
    for keep in (False, True) if backend == "cpu" else (False,):
        check_loss(module, replace(case, rows=line.names, keys="few"), line, device, keep)


@pytest.mark.parametrize("keys", ["", "few"])
def test_columns_of_other_processes(backend, keys, device):
    """Rows of a part of the problem, with the whole problem's log-sums and gradients on the columns: the whole gradient of those rows."""
    names = ("all", "different", "similarity", "count") if keys else ("all",)
    whole = problem(Case(90, d=24, keys=keys, rows=names), device)
    module = BACKENDS[backend]
    terms = module.forward(whole, names, (), False)
    grads = incoming(names, terms.rows)
    nothing = Side((), terms.columns, terms.columns)
    want = module.backward(whole, Side(names, terms.rows, grads), nothing, terms.norms, terms.kept, (True, False, False, False)).rows
    for part in (slice(0, 40), slice(40, 90)):
        own = torch.arange(90, device=device)[part]
        mine = Pairs(whole.rows[part].contiguous(), whole.rows, whole.scale, True, None, None, None, own)
        if keys:
            mine = mine._replace(row_keys=whole.row_keys[part].contiguous(), column_keys=whole.row_keys)
        part_terms = module.forward(mine, names, (), False)
        rows = Side(names, part_terms.rows, grads[:, part].contiguous())
        columns = Side(names, terms.rows, grads)
        got = module.backward(mine, rows, columns, part_terms.norms, part_terms.kept, (True, False, False, False))
        torch.testing.assert_close(got.rows, want[part], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(part_terms.rows, terms.rows[:, part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.n * (c.m or c.n) > 4000][:8], ids=str)
def test_same_bits(backend, case, device):
    pairs = problem(case, device)
    first, second = (run(BACKENDS[backend], pairs, case) for _ in range(2))
    for x, y in zip((*first[0][:2], *first[3]), (*second[0][:2], *second[3]), strict=True):
        assert x is y is None or torch.equal(x, y)


@pytest.mark.parametrize(
    "needs", [(True, False, False, False), (False, True, False, False), (False, False, True, False), (False, False, False, True)]
)
def test_one_gradient_alone(backend, needs, device):
    case = Case(70, 41, rows=SCL_AND_DIFFERENT, columns=("all",), keys="few", own=True, bias=True, learned=True)
    pairs, module = problem(case, device), BACKENDS[backend]
    terms, row_grads, column_grads, every = run(module, pairs, case)
    sides = Side(case.rows, terms.rows, row_grads), Side(case.columns, terms.columns, column_grads)
    for got, want, need in zip(module.backward(pairs, *sides, terms.norms, terms.kept, needs), every, needs, strict=True):
        assert (got is not None) == need
        if need:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


SCL_AND_DIFFERENT = ("all", "different", "similarity", "count")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [None, 41])
def test_what_is_not_finite_reaches_every_quantity_it_is_in(backend, value, m, device):
    case = Case(70, m, keys="few", rows=("all", "similarity", "count"))
    pairs = problem(case, device)
    pairs.rows[3, 2] = value
    values = BACKENDS[backend].forward(pairs, case.rows, (), False).rows
    assert not values[0, 3].isfinite() and not values[1, 3].isfinite()
    if m is None:
        assert not values[0].isfinite().any()


def test_one_pair_alone_is_exactly_its_similarity(backend, device):
    """So that a loss which is 0 by definition comes out 0."""
    pairs = problem(Case(2, d=7, keys="few"), device)._replace(row_keys=torch.zeros(2, dtype=torch.int64, device=device))
    values = BACKENDS[backend].forward(pairs, ("all", "similarity", "count"), (), False).rows
    assert torch.equal(values[0], values[1])
