"""On a CUDA device: the cuda and triton backends at sizes that the contract's cases leave out, and how they behave there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from contract import ALL, PSC, SCL, Case, check, check_bits, error, problem, run

from fastsupcon import PSCLoss, SupConLoss
from fastsupcon import functional as F
from fastsupcon.backends import BACKENDS, _extension, reference, triton
from fastsupcon.backends.triton import launch
from fastsupcon.problem import Pairs, Side

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
GPU = torch.device("cuda", 0)
SELF = [(2, 1), (63, 3), (65, 64), (1000, 8), (1000, 100), (1000, 104), (129, 136), (1000, 192), (513, 129), (300, 256), (300, 512)]
LARGE = [(130, 1024), (5000, 64), (9000, 128)]
CROSS = [(1, 7, 5), (70, 150, 64), (200, 5000, 128), (129, 300, 200), (129, 300, 320), (3000, 10, 128)]


@pytest.fixture(params=["cuda", "triton"])
def name(request):
    reason = BACKENDS[request.param].unusable(GPU, F32, 64)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize(("n", "d"), SELF + LARGE)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("scale", [10.0, 1000.0], ids=["bounded", "running"])
def test_self(name, n, d, dtype, scale):
    check(BACKENDS[name], Case(n, d=d, dtype=dtype, scale=scale, keys="few"), GPU)


@pytest.mark.parametrize(("n", "m", "d"), CROSS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("scale", [10.0, 1000.0], ids=["bounded", "running"])
@pytest.mark.parametrize("whole", [False, True])
def test_cross(name, n, m, d, dtype, scale, whole):
    options = {"rows": ALL, "columns": ALL, "bias": True, "own": True} if whole else {"rows": PSC}
    check(BACKENDS[name], Case(n, m, d=d, dtype=dtype, scale=scale, keys="few", **options), GPU)


@pytest.mark.parametrize("d", [264, 520, 768, 1024])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_deep_rows(name, d, dtype):
    """Where the CUDA kernels share the result between consumers or blocks: odd numbers of panels, ragged and split columns."""
    check(BACKENDS[name], Case(1000, d=d, dtype=dtype, scale=10.0, keys="few"), GPU)
    check(BACKENDS[name], Case(300, 200, d=d, dtype=dtype, scale=10.0, rows=ALL, columns=ALL, own=True, keys="int64"), GPU)
    check(BACKENDS[name], Case(200, 5000, d=d, dtype=dtype, rows=ALL, columns=ALL, bias=True, keys="int64"), GPU)


@pytest.mark.parametrize("d", [64, 100, 128, 256, 384, 512, 768, 1024])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("scale", [6.0, 1000.0], ids=["bounded", "running"])
@pytest.mark.parametrize("unit", [True, False])
def test_sums_that_the_device_finds_bounded_or_not(name, d, dtype, scale, unit):
    """A learned scale, and rows as they are: of both shapes, with the quantities of rows and columns; and a single row that is long."""
    options = {"d": d, "dtype": dtype, "scale": scale, "unit": unit, "learned": True, "keys": "few"}
    check(BACKENDS[name], Case(1000, **options), GPU)
    check(BACKENDS[name], Case(300, 700, rows=SCL, columns=SCL, own=True, **options), GPU)
    check(BACKENDS[name], Case(300, 200, rows=ALL, columns=PSC, **options), GPU)
    if not unit and scale == 6.0:
        check(BACKENDS[name], Case(1000, long_row=1000.0, **options), GPU)
    check_bits(BACKENDS[name], Case(1000, **options), GPU)


@pytest.mark.parametrize("group", [1, 8])  # row blocks
@pytest.mark.parametrize(
    ("n", "d", "keys"),
    [
        *((3, 64, "few"), (385, 8, "int64"), (1160, 128, "few"), (2000, 64, "int64"), (1501, 256, "int64"), (5000, 128, "few")),
        *((3, 264, "few"), (1501, 320, "int64"), (1160, 512, "few"), (3001, 512, "few"), (1501, 768, "int64"), (800, 1024, "few")),
    ],
)
def test_each_pair_once(n, d, keys, group, monkeypatch):
    """The forward of csrc/cuda/triangle.h where it would not be chosen."""
    if torch.cuda.get_device_capability(GPU) != (9, 0):
        pytest.skip("for Hopper")
    if reason := BACKENDS["cuda"].unusable(GPU, BF16, d):
        pytest.skip(f"cuda: {reason}")
    monkeypatch.setenv("FASTSUPCON_TRIANGLE", str(group))
    check(BACKENDS["cuda"], Case(n, d=d, dtype=F16 if n % 2 else BF16, scale=10.0, keys=keys), GPU)
    check_bits(BACKENDS["cuda"], Case(n, d=d, dtype=BF16, scale=10.0, keys=keys), GPU)


@pytest.mark.parametrize(("n", "d", "dtype"), [(700, 64, BF16), (5000, 128, BF16), (3000, 128, F16), (1000, 100, F32), (400, 512, BF16)])
def test_the_same_bits_every_time(name, n, d, dtype):
    check_bits(BACKENDS[name], Case(n, d=d, dtype=dtype, scale=10.0, keys="few"), GPU)


# Blocks have 64 rows or more of f32, and 256 of bf16 where wgmma serves: more blocks than the 65,535 that a grid has in y.
@pytest.mark.parametrize(("n", "dtype"), [(65_537 * 64, F32), (65_537 * 256, BF16)], ids=str)
def test_more_row_blocks_than_a_grid_has_in_y(name, n, dtype):
    pairs = Pairs(
        torch.randn(n, 8, device=GPU).to(dtype),
        torch.randn(10, 8, device=GPU).to(dtype),
        scale=2.0,
        unit=True,
        row_keys=torch.arange(n, device=GPU) % 10,
        column_keys=torch.arange(10, device=GPU),
    )
    nothing = torch.empty(0, 10, device=GPU)
    terms = BACKENDS[name].forward(pairs, PSC, (), False)
    grads = torch.ones_like(terms.rows)
    needs = (True, False, False, False)
    sides = Side(PSC, terms.rows, grads), Side((), nothing, nothing)
    gradients = BACKENDS[name].backward(pairs, *sides, terms.norms, terms.kept, needs)

    picked = torch.cat([torch.arange(0, n, n // 1000, device=GPU), torch.arange(n - 100, n, device=GPU)])
    some = pairs._replace(rows=pairs.rows[picked].double(), columns=pairs.columns.double(), row_keys=pairs.row_keys[picked])
    exact = reference.forward(some, PSC, (), False)
    sides = Side(PSC, exact.rows, grads[:, picked].double()), Side((), nothing.double(), nothing.double())
    expected = reference.backward(some, *sides, exact.norms, exact.kept, needs)
    torch.testing.assert_close(terms.rows[:, picked].double(), exact.rows, rtol=1e-5, atol=1e-5)
    assert error(gradients.rows[picked], expected.rows) < torch.finfo(dtype).eps + 1e-5


# --- whole losses ----------------------------------------------------------------------------------------------------------------------


def scl(z, labels, name):
    loss = F.supcon_loss(z, labels, temperature=0.1, normalize=True, backend=name)
    return loss, torch.autograd.grad(loss, z)[0]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1000, 128, generator=generator).cuda().to(BF16).requires_grad_()
    return z, torch.randint(0, 50, (1000,), generator=generator).cuda()


@pytest.mark.parametrize("warm", [True, False])
def test_cuda_graph(name, batch, warm):
    """Also where the first launch of all is inside of the capture."""
    z, labels = batch
    if warm or name == "triton":  # whose first call compiles
        scl(z, labels, name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scl(z, labels, name)
    with torch.no_grad():
        z.copy_(torch.randn_like(z))  # replayed on new rows
    graph.replay()
    torch.cuda.synchronize()
    for mine, expected in zip(captured, scl(z, labels, name), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_graph_decides_anew_whether_sums_are_bounded(name, batch, normalize):
    """Captured where they are, replayed where they are not, with another temperature and longer rows, and where they are again."""
    z, labels = batch
    temperature = torch.tensor(0.5, device=GPU, requires_grad=True)
    with torch.no_grad():
        z.copy_(torch.nn.functional.normalize(z.float()))

    def step():
        loss = F.supcon_loss(z, labels, temperature=temperature, normalize=normalize, backend=name)
        return loss, *torch.autograd.grad(loss, (z, temperature))

    step()  # the first call of Triton compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for length, value in ((1.0, 0.001), (100.0, 0.5), (1.0, 0.2)):
        with torch.no_grad():
            z.copy_(torch.nn.functional.normalize(z.float()) * length)
            temperature.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        for mine, expected in zip(captured, step(), strict=True):
            assert torch.equal(mine, expected)


def test_kept_launches_give_the_bits_of_ordinary_ones(batch, monkeypatch):
    if reason := triton.unusable(GPU, BF16, 128):
        pytest.skip(f"triton: {reason}")
    kept = [scl(*batch, "triton") for _ in range(2)][1]
    monkeypatch.setattr(launch, "_keeps", lambda device: False)
    for mine, expected in zip(kept, scl(*batch, "triton"), strict=True):
        assert torch.equal(mine, expected)


FIRST_LAUNCH = """
import torch
from fastsupcon import functional as F

z = torch.randn(1000, 128, device="cuda").bfloat16().requires_grad_()
labels = torch.arange(1000, device="cuda") % 50

def step():
    loss = F.supcon_loss(z, labels, temperature=0.1, normalize=True, backend="cuda")
    return loss, torch.autograd.grad(loss, z)[0]

torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
graph.replay()
torch.cuda.synchronize()
assert all(map(torch.equal, captured, step()))
"""


@pytest.mark.parametrize("loading", ["EAGER", "LAZY"])
def test_a_first_launch_inside_a_capture(loading):
    if reason := BACKENDS["cuda"].unusable(GPU, BF16, 128):
        pytest.skip(f"cuda: {reason}")
    environment = os.environ | {"CUDA_MODULE_LOADING": loading}
    ran = subprocess.run([sys.executable, "-c", FIRST_LAUNCH], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_failed_call_leaves_no_error_behind():
    if reason := BACKENDS["cuda"].unusable(GPU, F32, 16):
        pytest.skip(f"cuda: {reason}")
    z = torch.randn(70, 16, device=GPU)
    right, values = F.self_logsumexp(z, backend="cuda"), torch.empty(1, 70, device=GPU)
    places = _extension.quantities(("all",), values), _extension.quantities((), values)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
        _extension.module.cuda.forward(_extension.problem(Pairs(z)), *places, 0, False, 63)  # of as many GPUs as no machine has
    assert torch.equal(F.self_logsumexp(z, backend="cuda"), right)
    torch.cuda.synchronize()


def test_compile(name, batch):
    z, labels = batch

    @torch.compile(fullgraph=True)
    def compiled(z, labels):
        return F.supcon_loss(z, labels, temperature=0.1, normalize=True, backend=name)

    loss = compiled(z, labels)
    gradient = torch.autograd.grad(loss, z)[0]  # out here: not every torch traces it
    expected = scl(z, labels, name)
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected[1], rtol=2e-2, atol=1e-5)


def test_no_host_sync(name, batch):
    z, labels = batch
    prototypes, temperature = torch.randn(50, 128, device=GPU, dtype=BF16), torch.tensor(0.1, device=GPU, requires_grad=True)

    def step():
        scl(z, labels, name)
        F.psc_loss(z, labels, prototypes, temperature=temperature, backend=name).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_launches_of_a_step(name, batch):
    """One is PyTorch's, the seed of the backward. Of rows as they are the cuda backend finds the lengths and has both families ready."""
    z, labels = batch
    for loss, most in (
        (SupConLoss(normalize=True, backend=name), 8),
        (SupConLoss(backend=name), 9),
        (PSCLoss(50, 128, backend=name).to(GPU, BF16), 8),
    ):
        loss(z, labels).backward()
        z.grad = None
        loss.zero_grad(set_to_none=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            loss(z, labels).backward()
            torch.cuda.synchronize()
        kernels = [event.key for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) <= most, kernels


def test_a_label_out_of_range_makes_psc_nan(name):
    z, labels = torch.randn(70, 16, device=GPU, requires_grad=True), torch.arange(70, device=GPU) % 6
    loss = F.psc_loss(z, labels, torch.randn(5, 16, device=GPU), backend=name)
    loss.backward()
    assert loss.isnan()
    assert z.grad.isnan().any()


def test_another_stream(name):
    """The rows are written late on a side stream; a kernel on any other stream would read the old ones."""
    fresh = torch.randn(2000, 128, device=GPU).to(BF16)
    exact = F.self_logsumexp(fresh, scale=0.1, backend=name)
    z = torch.zeros_like(fresh)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        z.copy_(fresh)
        lse = F.self_logsumexp(z, scale=0.1, backend=name)
    stream.synchronize()
    assert torch.equal(lse, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device(name):
    z = torch.randn(300, 64, dtype=BF16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    lse = F.self_logsumexp(z, scale=0.1, backend=name)
    assert lse.device == z.device
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(lse.double(), F.self_logsumexp(z.double(), scale=0.1, backend="reference"), rtol=5e-6, atol=5e-6)


def test_extra_memory(name):
    """Beside inputs and outputs: less than 2 MB and some floats per row at 65,536 x 128, of which Triton's partial sums are the most."""
    case = Case(65536, d=128, dtype=BF16, scale=10.0, keys="few")
    pairs = problem(case, GPU)
    run(BACKENDS[name], pairs, case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    terms, _, _, gradients = run(BACKENDS[name], pairs, case)
    torch.cuda.synchronize()
    outputs = sum(x.numel() * x.element_size() for x in (*terms, gradients.rows))
    assert torch.cuda.max_memory_allocated() - before - outputs < 2_000_000 + (64 + 4 * 64 * 2) * case.n
