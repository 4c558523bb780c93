"""The Triton kernels against float64, value and gradient: on a GPU, or else in Triton's interpreter (conftest.py).

The interpreter of Triton 3.6 needs NumPy < 2.4; that of Triton 3.7 and newer takes any.
"""

from __future__ import annotations

import pytest
import torch

from fastsupcon.backends import reference, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)
UNUSABLE = triton.unusable(torch.device(DEVICE), torch.float32, 8)
pytestmark = pytest.mark.skipif(UNUSABLE is not None, reason=f"triton: {UNUSABLE}")


def unit(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, device=DEVICE), dim=1).to(dtype)


def double(tensors):
    return [tensor.double() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor for tensor in tensors]


def plain(a, b, bias, forbidden, scale, grad, needs_sum: bool):
    """lse and gradients of plain PyTorch in the rows' dtype: the logits, the softmax and both products are rounded to it."""
    rows = [tensor.detach().clone().requires_grad_() for tensor in ((a,) if needs_sum else (a, b))]
    logits = rows[0] @ rows[-1].T * scale
    if bias is not None:
        bias = bias.clone().requires_grad_()
        logits = logits + bias.to(logits.dtype)
    lse = logits.masked_fill(forbidden, -torch.inf).logsumexp(1)
    found = torch.autograd.grad(lse, [*rows] + ([] if bias is None else [bias]), grad.to(lse.dtype))
    return lse.detach(), found


def assert_as_good(found, exact, plainly, small):
    """The rule: the error is at most twice plain PyTorch's in the same dtype, plus one rounding of the largest value."""
    assert found.isfinite().all()
    error, allowed = (found.double() - exact).abs().max(), 2 * (plainly.double() - exact).abs().max() + small * exact.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


#: One rounding of each dtype (fp32: a few). Triton's interpreter cuts bf16 off where a GPU rounds, so there one costs twice as much.
SMALL = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8 if DEVICE == "cuda" else 2.0**-7, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("n, d", [(2, 1), (33, 3), (63, 64), (65, 129), (150, 32)])
@pytest.mark.parametrize("unit_rows, scale", [(True, 10.0), (False, 10.0), (False, 1000.0)])
def test_self(dtype, n, d, unit_rows, scale):
    torch.manual_seed(n)
    z, grad = unit(n, d, dtype=dtype), torch.randn(n, device=DEVICE) / n
    exact = reference.self_forward(z.double(), scale, unit_rows)
    exact_dz = reference.self_backward(z.double(), exact, grad.double(), scale, unit_rows)
    plain_lse, (plain_dz,) = plain(z, z, None, torch.eye(n, dtype=torch.bool, device=DEVICE), scale, grad, True)
    lse = triton.self_forward(z, scale, unit_rows)
    dz = triton.self_backward(z, lse, grad, scale, unit_rows)
    assert lse.dtype == torch.float32 and dz.dtype == dtype
    assert_as_good(lse, exact, plain_lse, 1e-6)
    assert_as_good(dz, exact_dz, plain_dz, SMALL[dtype])


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (65, 10, 100), (5, 150, 32)])
@pytest.mark.parametrize("rule", ["none", "skip", "labels"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross(dtype, n, m, d, rule, with_bias):
    torch.manual_seed(m)
    a, b, grad = unit(n, d, dtype=dtype), unit(m, d, dtype=dtype), torch.randn(n, device=DEVICE) / n
    bias = torch.randn(m, device=DEVICE) if with_bias else None
    column = torch.arange(m, device=DEVICE)
    skip = rows = columns = None
    forbidden = torch.zeros(n, m, dtype=torch.bool, device=DEVICE)
    if rule == "skip" and m > 1:
        skip = torch.randint(-1, m, (n,), device=DEVICE)
        forbidden = skip[:, None] == column
    elif rule == "labels" and m > 1:
        rows, columns = torch.randint(0, 3, (n,), device=DEVICE), column % 4
        forbidden = rows[:, None] == columns
    problem = (a, b, bias, skip, rows, columns)
    exact = reference.cross_forward(*double(problem), 10.0)
    needs = (True, True, with_bias)
    exact_grads = reference.cross_backward(*double(problem), exact, grad.double(), 10.0, needs)
    plain_lse, plain_grads = plain(a, b, bias, forbidden, 10.0, grad, False)
    lse = triton.cross_forward(*problem, 10.0)
    found = triton.cross_backward(*problem, lse, grad, 10.0, needs)
    assert_as_good(lse, exact, plain_lse, 1e-6)
    for got, want, plainly in zip(found[: 2 + with_bias], exact_grads, plain_grads, strict=False):
        assert_as_good(got, want, plainly, SMALL[dtype])
    for k in range(2 + with_bias):  # each alone is what all together were
        alone = triton.cross_backward(*problem, lse, grad, 10.0, tuple(i == k for i in range(3)))
        assert [x is None for x in alone] == [i != k for i in range(3)]
        assert torch.equal(alone[k], found[k])


@pytest.mark.parametrize("dtype", SMALL)
def test_raw_rows(dtype):
    """Norms near 30, logits in the thousands: plain half precision is not good there, so the bound is the reference in fp32's."""
    torch.manual_seed(0)
    z = (torch.randn(70, 20, device=DEVICE) * 7).to(dtype)
    exact, fp32 = (reference.self_forward(z.to(kind), 1.0, False) for kind in (torch.float64, torch.float32))
    assert_as_good(triton.self_forward(z, 1.0, False), exact, fp32, 1e-6)


@pytest.mark.parametrize("factor", [65536.0, 1.0, 2.0**-30])
@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradient_scale(dtype, unit_rows, factor):
    """A loss scaled for mixed precision, or a tiny one: dz scales along, and does not lose digits in the tile."""
    torch.manual_seed(1)
    z, grad = unit(70, 16, dtype=dtype), torch.full((70,), factor / 70, device=DEVICE)
    lse = triton.self_forward(z, 10.0, unit_rows)
    exact = reference.self_backward(z.double(), lse.double(), grad.double(), 10.0, unit_rows)
    # W and dz are rounded once each: u |W| |z| and u |dz|, u one rounding
    logits = (z.double() @ z.double().T * 10.0).fill_diagonal_(-torch.inf)
    rows = grad[:, None].double() * (logits - lse.double()[:, None]).exp()
    size = 10.0 * (rows + rows.T) @ z.double().abs()
    bound = SMALL[dtype] * (size + exact.abs() + torch.finfo(dtype).smallest_normal)
    assert ((triton.self_backward(z, lse, grad, 10.0, unit_rows).double() - exact).abs() <= 1.01 * bound).all()


@pytest.mark.parametrize("unit_rows", [True, False])
def test_one_row(unit_rows):
    z = unit(1, 8, dtype=torch.float32)
    lse = triton.self_forward(z, 10.0, unit_rows)
    assert lse.item() == -torch.inf
    assert torch.equal(triton.self_backward(z, lse, torch.ones(1, device=DEVICE), 10.0, unit_rows), torch.zeros_like(z))


def test_row_without_columns():
    """Every column excluded: lse -inf, and no gradient from that row."""
    a, b = unit(3, 8, dtype=torch.float32), unit(5, 8, dtype=torch.float32)
    rows, columns = torch.tensor([7, 1, 2], device=DEVICE), torch.full((5,), 7, device=DEVICE)
    problem = (a, b, None, None, rows, columns)
    lse = triton.cross_forward(*problem, 10.0)
    assert lse[0].item() == -torch.inf and lse[1:].isfinite().all()
    grad = torch.ones(3, device=DEVICE)
    da, db, _ = triton.cross_backward(*problem, lse, grad, 10.0, (True, True, False))
    assert (da[0] == 0).all() and da.isfinite().all() and db.isfinite().all()


@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("dtype", SMALL)
def test_nan_is_not_hidden(dtype, unit_rows):
    z = unit(40, 8, dtype=dtype)
    z[17, 3] = torch.nan
    lse = triton.self_forward(z, 10.0, unit_rows)
    assert lse.isnan().all()
    assert triton.self_backward(z, lse, torch.ones(40, device=DEVICE), 10.0, unit_rows).isnan().all()


def test_infinite_logits():
    z = unit(40, 8, dtype=torch.float32)
    z[17] = torch.inf
    assert torch.equal(triton.self_forward(z, 1.0, False).isfinite(), reference.self_forward(z, 1.0, False).isfinite())


@pytest.mark.parametrize("unit_rows", [True, False])
def test_same_bits(unit_rows):
    z, grad = unit(150, 24, dtype=torch.bfloat16), torch.randn(150, device=DEVICE)
    lse = [triton.self_forward(z, 10.0, unit_rows) for _ in range(2)]
    dz = [triton.self_backward(z, lse[0], grad, 10.0, unit_rows) for _ in range(2)]
    assert torch.equal(*lse) and torch.equal(*dz)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU needs no interpreter")
@pytest.mark.parametrize(
    "triton_version, numpy_version, fine", [("3.6.0", "2.4.1", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.1", True)]
)
def test_interpreter_and_numpy(monkeypatch, triton_version, numpy_version, fine):
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    reason = triton.unusable(torch.device("cpu"), torch.float32, 8)
    assert reason is None if fine else "needs NumPy < 2.4" in reason
