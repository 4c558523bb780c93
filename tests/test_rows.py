"""rows.py against plain PyTorch: unit rows at any magnitude, sums by class, gathering with a reproducible gradient."""

import pytest
import torch

from fastsupcon.rows import gather_rows, sum_rows, unit_rows


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1.0, 1e18, 1e37])
def test_unit_rows_at_any_magnitude(device, magnitude):
    """The squares of such rows leave fp32's range; their directions are computed all the same."""
    x = torch.randn(7, 5, device=device) * magnitude
    expected = torch.nn.functional.normalize(x.double(), dim=1, eps=0)
    torch.testing.assert_close(unit_rows(x).double(), expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_unit_rows_keep_their_dtype_and_are_rounded_once(device, dtype):
    x = torch.randn(7, 5, device=device).to(dtype)
    unit = unit_rows(x)
    assert unit.dtype == dtype
    expected = torch.nn.functional.normalize(x.double(), dim=1)
    torch.testing.assert_close(unit.double(), expected, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-15)


def test_rows_of_zeros_stay_zero_and_nan_stays_nan(device):
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [float("nan"), 1.0], [float("inf"), 1.0]], device=device, requires_grad=True)
    unit = unit_rows(x)
    assert unit[0].tolist() == [0, 0]
    torch.testing.assert_close(unit[1].detach(), torch.tensor([0.6, 0.8], device=device))
    assert unit[2].isnan().any()
    assert unit[3].isnan().any()
    (gradient,) = torch.autograd.grad(unit[:2].sum(), x)
    assert gradient[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "classes"), [(1, 1), (5, 9), (700, 3), (1000, 1000)])
def test_sum_rows(device, dtype, n, classes):
    x, ids = torch.randn(n, 6, device=device).to(dtype), torch.randint(0, classes, (n,), device=device)
    sums = sum_rows(x, ids, classes)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    one_hot = (ids[None] == torch.arange(classes, device=device)[:, None]).double()
    torch.testing.assert_close(sums.double(), one_hot @ x.double(), rtol=1e-5, atol=1e-5)


def test_gather_rows(device):
    x, ids = torch.randn(5, 3, device=device, requires_grad=True), torch.tensor([4, 0, 4, 4], device=device)
    gathered = gather_rows(x, ids)
    assert torch.equal(gathered, x[ids])
    weights = torch.randn(4, 3, device=device)
    (ours,) = torch.autograd.grad((gathered * weights).sum(), x)
    (expected,) = torch.autograd.grad((x[ids] * weights).sum(), x)
    torch.testing.assert_close(ours, expected)
