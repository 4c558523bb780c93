"""rows.py against plain PyTorch: unit rows at any magnitude, sums by class, dots with others of the class and with gathered rows."""

import pytest
import torch

from fastsupcon import _rows_torch, rows
from fastsupcon.backends import sum_dtype
from fastsupcon.rows import sum_rows, unit_rows

HELPERS = [_rows_torch] if rows.extension_missing or torch.cuda.is_available() else [_rows_torch, rows._rows_cpu]


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


@pytest.mark.parametrize("helpers", HELPERS, ids=lambda module: module.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (40, 67), (700, 128)])
def test_helpers_against_float64(monkeypatch, device, helpers, dtype, n, d):
    """Values and gradients of every helper, in C++ and in plain PyTorch: rounding to the dtype is all that may differ."""
    monkeypatch.setattr(rows, "_helpers", lambda x: helpers)
    z, table = torch.randn(n, d, device=device).to(dtype), torch.randn(9, d, device=device).to(dtype)
    ids, weight = torch.randint(0, 9, (n,), device=device), torch.rand(n, device=device).to(sum_dtype(dtype))
    same = (ids[:, None] == ids) & ~torch.eye(n, dtype=torch.bool, device=device)

    def step(unit, others, dots, *leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        values = unit(leaves[0]), others(leaves[0]), dots(*leaves)
        weights = [torch.linspace(0.5, 1.5, value.numel(), device=device).reshape(value.shape).to(value.dtype) for value in values]
        return [*values, *(g for v, w in zip(values, weights, strict=True) for g in torch.autograd.grad(v, leaves, w, allow_unused=True))]

    ours = step(
        rows.unit_rows,
        lambda z: rows.dots_with_others(z, ids, 9, weight)[1],
        lambda z, table: rows.row_dots(z, table, ids)[2],
        z,
        table,
    )
    exact = step(
        lambda z: z / z.norm(dim=1, keepdim=True),
        lambda z: weight * (same * (z @ z.T)).sum(1),
        lambda z, table: (z * table[ids]).sum(1),
        z.double(),
        table.double(),
    )
    for mine, true in zip(ours, exact, strict=True):
        assert (mine is None) == (true is None)
        if mine is not None:
            summed = 1e-12 if dtype == torch.float64 else 2e-6  # and one rounding to the dtype, or two where halves multiply halves
            assert (mine.double() - true).abs().max() <= (summed + 2 * torch.finfo(mine.dtype).eps) * max(1, true.abs().max())


@pytest.mark.parametrize("helpers", HELPERS, ids=lambda module: module.__name__)
def test_number_labels(device, helpers):
    labels = torch.tensor([7, -(2**62), 7, 2**40, 7, -(2**62), 0], device=device)
    ids, classes, share = helpers.number_labels(labels, torch.float32)
    assert torch.equal(ids[:, None] == ids, labels[:, None] == labels)
    assert 0 <= int(ids.min()) <= int(ids.max()) < classes
    assert share.tolist() == [0.5, 1.0, 0.5, 0.0, 0.5, 1.0, 0.0]


def test_ids_out_of_range_are_an_error_not_a_write_elsewhere():
    for bad in (-1, 4, 2**40):
        with pytest.raises(IndexError):
            rows.sum_rows(torch.ones(3, 2), torch.tensor([0, bad, 1]), 4)
        with pytest.raises(IndexError):
            rows.row_dots(torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, bad, 1]))


@pytest.mark.skipif(rows.extension_missing is not None, reason=str(rows.extension_missing))
def test_the_same_bits_on_any_number_of_threads():
    z, grad, ids = torch.randn(70_000, 96), torch.randn(70_000, 96), torch.arange(70_000) % 50
    weight, threads = torch.rand(70_000), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            leaf = z.clone().requires_grad_()
            unit = rows.unit_rows(leaf)
            unit, others = rows.dots_with_others(unit, ids, 50, weight)
            unit, _, dots = rows.row_dots(unit, unit.detach()[:50], ids)
            dots = dots + others
            results.append((unit.detach(), dots.detach(), *torch.autograd.grad((unit, dots), leaf, (grad, weight))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_an_exclusive_gradient_is_overwritten(device, dtype):
    z, table = torch.randn(60, 20, device=device).to(dtype), torch.randn(7, 20, device=device).to(dtype)
    ids, weight = torch.randint(0, 7, (60,), device=device), torch.rand(60, device=device)
    back = [torch.randn_like(z), torch.randn_like(table), weight]

    def step(exclusive, dz, dtable, h):
        leaf, columns = z.clone().requires_grad_(), table.clone().requires_grad_()
        passed, others = rows.dots_with_others(leaf, ids, 7, weight, exclusive=exclusive)
        passed, columns_passed, dots = rows.row_dots(passed, columns, ids, exclusive=exclusive)
        return torch.autograd.grad((passed, columns_passed, others + dots), (leaf, columns), (dz, dtable, h))

    kept = [tensor.clone() for tensor in back]
    expected = step(False, *back)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(back, kept, strict=True))
    assert all(torch.equal(mine, true) for mine, true in zip(step(True, *kept), expected, strict=True))
