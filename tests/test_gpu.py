"""On a CUDA device: value and gradient of the cuda and triton backends against float64, and how they behave inside PyTorch."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn.functional import normalize

from fastsupcon import functional as F
from fastsupcon.backends import BACKENDS, reference, sum_dtype

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FUSED = ("cuda", "triton")
SHAPES = [(2, 1), (63, 3), (65, 64), (1000, 100), (1000, 128), (513, 129), (300, 256), (300, 512), (130, 1024), (5000, 64), (9000, 128)]


@pytest.fixture(params=FUSED)
def fused(request):
    module = BACKENDS[request.param]
    reason = module.unusable(torch.device("cuda", 0), F32, 64)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return module


def rows(count, depth, dtype, seed=0, unit=True, device="cuda"):
    values = torch.randn(count, depth, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (normalize(values) if unit else values).to(device, dtype)


def assert_close(got, plain, exact, dtype):
    """Twice the error of plain PyTorch in the same dtype, plus a few units of its rounding."""
    assert got.isfinite().all()
    unit = {F32: 3e-6, F16: 2e-3, BF16: 1.6e-2}[dtype]
    error, allowed = (got.double() - exact).norm(), 2 * (plain.double() - exact).norm() + unit * exact.norm()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def check_self(fused, count, depth, dtype, unit):
    z = rows(count, depth, dtype)
    grad = torch.rand(count, device="cuda") / count
    exact_lse = reference.self_forward(z.double(), 10.0, unit)
    lse = fused.self_forward(z, 10.0, unit)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=5e-6, atol=5e-6)
    exact = reference.self_backward(z.double(), exact_lse, grad.double(), 10.0, unit)
    plain = reference.self_backward(z, exact_lse.float(), grad, 10.0, unit)
    assert_close(fused.self_backward(z, lse, grad, 10.0, unit), plain, exact, dtype)


@pytest.mark.parametrize(("count", "depth"), SHAPES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("path", ["bounded", "online"])
def test_self(fused, count, depth, dtype, path):
    check_self(fused, count, depth, dtype, path == "bounded")


def check_cross(fused, count, columns, depth, dtype, rule, with_bias):
    a, b = rows(count, depth, dtype, 1), rows(columns, depth, dtype, 2)
    bias = torch.randn(columns, device="cuda") if with_bias else None
    skip = torch.randint(-1, columns, (count,), device="cuda") if rule == "skip" else None
    labels = [torch.randint(0, 7, (n,), device="cuda") if rule == "labels" else None for n in (count, columns)]
    grad = torch.randn(count, device="cuda") / count
    wide = (a.double(), b.double(), None if bias is None else bias.double())
    exact_lse = reference.cross_forward(*wide, skip, *labels, 10.0)
    lse = fused.cross_forward(a, b, bias, skip, *labels, 10.0)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=5e-6, atol=5e-6)
    needs = (True, True, with_bias)
    got = fused.cross_backward(a, b, bias, skip, *labels, lse, grad, 10.0, needs)
    exact = reference.cross_backward(*wide, skip, *labels, exact_lse, grad.double(), 10.0, needs)
    for mine, true, kind in zip(got, exact, (dtype, dtype, F32), strict=True):
        if true is not None:
            assert_close(mine, true.to(kind), true, kind)


@pytest.mark.parametrize(("count", "columns", "depth"), [(1, 7, 5), (70, 150, 64), (200, 5000, 128), (129, 300, 320), (3000, 10, 128)])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("rule", ["none", "skip", "labels"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross(fused, count, columns, depth, dtype, rule, with_bias):
    check_cross(fused, count, columns, depth, dtype, rule, with_bias)


@pytest.mark.parametrize("fused", ["cuda"], indirect=True)
@pytest.mark.parametrize("depth", [264, 520, 768, 1024])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_deep_rows(fused, depth, dtype):
    """Where the CUDA kernels share the result between consumers or blocks: odd numbers of panels, ragged and split columns."""
    for unit in (True, False):
        check_self(fused, 1000, depth, dtype, unit)
    check_cross(fused, 200, 5000, depth, dtype, "labels", True)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("scale", "unit"), [(1000.0, True), (0.1, True), (42.0, True), (30.0, False)])
def test_any_temperature_and_raw_rows(fused, dtype, scale, unit):
    z = rows(500, 64, dtype, unit=unit)
    grad = torch.rand(500, device="cuda") / 500
    exact_lse = reference.self_forward(z.double(), scale, unit)
    lse = fused.self_forward(z, scale, unit)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=5e-6, atol=1e-4)
    exact = reference.self_backward(z.double(), exact_lse, grad.double(), scale, unit)
    plain = reference.self_backward(z, exact_lse.float(), grad, scale, unit)
    assert_close(fused.self_backward(z, lse, grad, scale, unit), plain, exact, dtype)


def test_edge_cases(fused):
    one = rows(1, 8, BF16)
    lse = fused.self_forward(one, 10.0, True)
    assert lse.item() == -torch.inf
    assert not fused.self_backward(one, lse, torch.ones(1, device="cuda"), 10.0, True).any()
    zeros = torch.zeros(70, 64, dtype=BF16, device="cuda")  # zero rows, all duplicates
    lse = fused.self_forward(zeros, 10.0, False)
    torch.testing.assert_close(lse, torch.full_like(lse, 69).log())
    assert not fused.self_backward(zeros, lse, torch.ones(70, device="cuda"), 10.0, False).any()
    z = rows(70, 64, BF16)
    z[5, 7] = torch.nan
    for unit in (True, False):
        assert fused.self_forward(z, 10.0, unit).isnan().all()
    labels = torch.zeros(70, dtype=torch.int64, device="cuda")  # no row allows a column
    a = rows(70, 64, BF16)
    lse = fused.cross_forward(a, a.clone(), None, None, labels, labels, 10.0)
    assert (lse == -torch.inf).all()
    grad = torch.ones(70, device="cuda")
    da, db, _ = fused.cross_backward(a, a.clone(), None, None, labels, labels, lse, grad, 10.0, (True, True, False))
    assert not da.any()
    assert not db.any()


@pytest.mark.parametrize("factor", [65536.0, 1e-6])
def test_half_gradients_of_any_size(fused, factor):
    z = rows(700, 64, F16)
    grad = torch.rand(700, device="cuda") / 700 * factor
    lse = fused.self_forward(z, 5.0, True)
    exact = reference.self_backward(z.double(), lse.double(), grad.double(), 5.0, True)
    dz = fused.self_backward(z, lse, grad, 5.0, True)
    floor = 6e-8 * dz.numel() ** 0.5
    assert (dz.double() - exact).norm() <= 2 * (exact.to(F16).double() - exact).norm() + 1e-3 * exact.norm() + floor


@pytest.mark.parametrize(
    ("count", "depth", "dtype"), [(700, 64, BF16), (5000, 128, BF16), (3000, 128, F16), (1000, 100, F32), (400, 512, BF16)]
)
def test_the_same_bits_every_time(fused, count, depth, dtype):
    z = rows(count, depth, dtype)
    grad = torch.rand(count, device="cuda") / count
    first = None
    for _ in range(20):
        lse = fused.self_forward(z, 10.0, True)
        both = lse, fused.self_backward(z, lse, grad, 10.0, True)
        if first is None:
            first = both
        assert all(torch.equal(mine, other) for mine, other in zip(both, first, strict=True))


def loss_and_gradient(z, labels, backend):
    loss = F.supcon_loss(z, labels, temperature=0.1, normalize=True, backend=backend)
    return loss, torch.autograd.grad(loss, z)[0]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1000, 128, generator=generator).cuda().to(BF16).requires_grad_()
    return z, torch.randint(0, 50, (1000,), generator=generator).cuda()


@pytest.fixture(params=FUSED)
def name(request, fused):
    if BACKENDS[request.param] is not fused:
        pytest.skip("the other backend's turn")
    return request.param


def test_cuda_graph(name, batch):
    z, labels = batch
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss_and_gradient(z, labels, name)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(z, labels, name)
    with torch.no_grad():
        z.copy_(torch.randn_like(z))  # replayed on new rows
    graph.replay()
    torch.cuda.synchronize()
    expected = loss_and_gradient(z, labels, name)
    assert torch.equal(captured[0], expected[0])
    assert torch.equal(captured[1], expected[1])


def test_compile(name, batch):
    z, labels = batch

    def step(z):
        return F.supcon_loss(z, labels, temperature=0.1, normalize=True, backend=name)

    loss = torch.compile(step, fullgraph=True)(z)
    (gradient,) = torch.autograd.grad(loss, z)
    expected = loss_and_gradient(z, labels, name)
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-4)
    assert_close(gradient, expected[1], expected[1].double(), BF16)


def test_no_host_sync(name, batch):
    z, labels = batch
    loss_and_gradient(z, labels, name)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(z, labels, name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream(fused):
    """The rows are written late on a side stream; a kernel on any other stream would read the old ones."""
    fresh = rows(2000, 128, BF16, seed=1)
    exact = fused.self_forward(fresh, 10.0, True)
    z = torch.zeros_like(fresh)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        z.copy_(fresh)
        lse = fused.self_forward(z, 10.0, True)
    stream.synchronize()
    assert torch.equal(lse, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device(fused):
    z = rows(300, 64, BF16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    lse = fused.self_forward(z, 10.0, True)
    assert lse.device == z.device
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(lse.double(), reference.self_forward(z.double(), 10.0, True), rtol=5e-6, atol=5e-6)


def test_extra_memory(fused):
    """Beside inputs and outputs: less than 2 MB and a few floats per row at 65,536 × 128; Triton's forward, a partial sum per group."""
    z = rows(65536, 128, BF16)
    grad = torch.rand(65536, device="cuda") / 65536

    def measured(step):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = step()
        torch.cuda.synchronize()
        return out, torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()

    lse, forward = measured(lambda: fused.self_forward(z, 10.0, True))
    _, backward = measured(lambda: fused.self_backward(z, lse, grad, 10.0, True))
    groups = importlib.import_module("fastsupcon.backends._triton_triangle").MOST_GROUPS if fused is BACKENDS["triton"] else 0
    assert forward < 2_000_000 + (16 + 4 * groups) * len(z)
    assert backward < 2_000_000 + 16 * len(z)
    assert lse.dtype == sum_dtype(BF16)
