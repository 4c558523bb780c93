"""The CUDA kernels' numerics without a GPU: their own sources, compiled as plain C++ over the emulator of tests/cuda_emulation."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastsupcon.backends import cuda as backend
from fastsupcon.backends import reference
from fastsupcon.backends._dtypes import tf32_allowed
from fastsupcon.backends._extension import missing as extension_missing

ROOT = Path(__file__).resolve().parents[1]
UNITS = ["lse.cu", "mma_f16.cu", "mma_bf16.cu", "mma_tf32.cu", "mma_f32.cu", "wgmma_f16.cu", "wgmma_bf16.cu", "bind.cpp"]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MMA, WGMMA = 80, 90  # compute capability, and by it the family of kernels


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to bind the emulated kernels")
    if extension_missing:
        pytest.skip(extension_missing)
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("g++ or the sources are not here")
    out = tmp_path_factory.mktemp("emulated")
    here = ROOT / "tests" / "cuda_emulation"
    sources = [*(ROOT / "csrc" / "cuda" / unit for unit in UNITS), here / "module.cpp", here / "emulator.cpp"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    for folder in (here, ROOT / "csrc" / "cuda", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")):
        flags += ["-I", str(folder)]

    def compile_unit(source: Path) -> str:
        target = str(out / f"{source.name}.o")
        subprocess.run([compiler, "-x", "c++", *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, sources))
    library = out / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(emulated, monkeypatch):
    """fastsupcon.backends.cuda itself, on cpu tensors."""

    def run(function, like, problem, self_shape, *addresses):
        call = (problem, self_shape, tf32_allowed(), *addresses)
        needed = function(*call, 0, 0, 0, 0)
        if needed:
            scratch = torch.full((needed,), 0xFF, dtype=torch.uint8)  # NaN where nobody writes
            assert function(*call, scratch.data_ptr(), needed, 0, 0) == needed

    monkeypatch.setattr(backend, "_C", emulated)
    monkeypatch.setattr(backend, "_run", run)
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full(like.shape, torch.nan, dtype=like.dtype))
    emulated.launched()
    return backend


def rows(count: int, depth: int, dtype: torch.dtype, seed: int, unit: bool = True) -> torch.Tensor:
    values = torch.randn(count, depth, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.nn.functional.normalize(values) if unit else values).to(dtype)


def assert_as_good_as_plain(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """At most twice the error that plain PyTorch makes in the same dtype, plus a few units of that dtype's rounding."""
    assert got.isfinite().all(), got
    unit = {F32: 2e-6, F16: 2e-3, BF16: 1.6e-2}[dtype]
    error, allowed = (got.double() - exact).norm(), 2 * (plain.double() - exact).norm() + unit * exact.norm()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def check_self(kernels, count, depth, dtype, scale=10.0, unit=True, gradient_scale=1.0):
    z = rows(count, depth, dtype, seed=count + depth, unit=unit)
    grad = torch.rand(count, generator=torch.Generator().manual_seed(1)) / count * gradient_scale
    exact_lse = reference.self_forward(z.double(), scale, unit)
    lse = kernels.self_forward(z, scale, unit)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=3e-6, atol=3e-6)
    dz = kernels.self_backward(z, lse, grad, scale, unit)
    exact = reference.self_backward(z.double(), exact_lse, grad.double(), scale, unit)
    assert_as_good_as_plain(dz, exact.to(dtype), exact, dtype)


def check_cross(kernels, count, columns, depth, dtype, rule, scale=10.0, with_bias=True):
    a, b = rows(count, depth, dtype, 1), rows(columns, depth, dtype, 2)
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(columns, generator=generator) if with_bias else None
    skip = torch.randint(-1, columns, (count,), generator=generator) if rule == "skip" else None
    labels = [torch.randint(0, 7, (n,), generator=generator) if rule == "labels" else None for n in (count, columns)]
    grad = torch.randn(count, generator=generator) / count
    exclusions = (skip, *labels)
    wide = (a.double(), b.double(), None if bias is None else bias.double())
    exact_lse = reference.cross_forward(*wide, *exclusions, scale)
    lse = kernels.cross_forward(a, b, bias, *exclusions, scale)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=3e-6, atol=3e-6)
    needs = (True, True, with_bias)
    got = kernels.cross_backward(a, b, bias, *exclusions, lse, grad, scale, needs)
    exact = reference.cross_backward(*wide, *exclusions, exact_lse, grad.double(), scale, needs)
    for name, mine, true in zip(("rows", "columns"), got, exact, strict=False):
        assert mine is not None, name
        assert_as_good_as_plain(mine, true.to(dtype), true, dtype)
    if with_bias:  # single precision, whatever the rows: so are plain PyTorch's logits here, which at depth 1000 are 4e-7 off
        single = (a.float(), b.float(), bias)
        plain_lse = reference.cross_forward(*single, *exclusions, scale)
        plain = reference.cross_backward(*single, *exclusions, plain_lse, grad, scale, needs)
        assert_as_good_as_plain(got[2], plain[2], exact[2], F32)


@pytest.mark.parametrize(("count", "depth"), [(1, 3), (2, 1), (63, 64), (65, 100), (130, 128), (70, 129), (65, 256), (66, 320), (300, 64)])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_self_mma(kernels, emulated, count, depth, dtype):
    emulated.set_device(4, MMA)
    if count == 1:
        z = rows(1, depth, dtype, 0)
        lse = kernels.self_forward(z, 10.0, True)
        assert lse.item() == -torch.inf
        assert (kernels.self_backward(z, lse, torch.ones(1), 10.0, True) == 0).all()
    else:
        check_self(kernels, count, depth, dtype)
    assert all(name.startswith(("mma", "combine", "largest")) for name in emulated.launched())


@pytest.mark.parametrize("depth", [8, 64, 104, 128, 136, 256])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_self_wgmma(kernels, emulated, depth, dtype):
    emulated.set_device(2, WGMMA)
    check_self(kernels, 300, depth, dtype)
    assert {"wgmma_forward", "wgmma_backward"} <= set(emulated.launched())


# Beyond the registers of one consumer: 5 … 16 panels of 64. Tiles of 32 columns: one, even and odd numbers of them, ragged and whole.
@pytest.mark.parametrize(("count", "depth"), [(3, 264), (70, 512), (130, 320), (64, 520), (97, 768), (200, 640), (90, 776), (33, 1024)])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("unit", [True, False])
def test_self_wgmma_deep(kernels, emulated, count, depth, dtype, unit):
    emulated.set_device(1, WGMMA)
    check_self(kernels, count, depth, dtype, unit=unit)
    assert {"wgmma_deep_forward", "wgmma_deep_backward"} == {name for name in emulated.launched() if name.startswith(("wgmma", "mma"))}


@pytest.mark.parametrize("count", [2, 65, 129, 700])
def test_self_wgmma_ragged_and_split(kernels, emulated, count):
    emulated.set_device(8, WGMMA)
    check_self(kernels, count, 64, BF16)


@pytest.mark.parametrize(("capability", "dtype", "depth"), [(MMA, F32, 40), (MMA, BF16, 64), (WGMMA, F16, 128), (MMA, F16, 320)])
@pytest.mark.parametrize("rule", ["none", "skip", "labels"])
def test_cross(kernels, emulated, capability, dtype, depth, rule):
    emulated.set_device(4, capability)
    check_cross(kernels, 70, 150, depth, dtype, rule)


@pytest.mark.parametrize(("dtype", "depth"), [(BF16, 320), (F16, 768), (F16, 1000), (BF16, 1024)])
@pytest.mark.parametrize("rule", ["none", "skip", "labels"])
def test_cross_wgmma_deep(kernels, emulated, dtype, depth, rule):
    emulated.set_device(1, WGMMA)
    check_cross(kernels, 70, 150, depth, dtype, rule)
    assert {"wgmma_deep_forward", "wgmma_deep_backward"} == {name for name in emulated.launched() if name.startswith(("wgmma", "mma"))}


def test_wgmma_deep_split(kernels, emulated):
    """Columns over several blocks, in the backward beside blocks that share the result's columns."""
    emulated.set_device(16, WGMMA)
    check_cross(kernels, 20, 1100, 512, BF16, "skip")
    check_self(kernels, 300, 1024, F16)
    assert {"combine_sums", "combine_logsums"} <= set(emulated.launched())


def test_cross_without_bias_and_split(kernels, emulated):
    for capability in (MMA, WGMMA):
        emulated.set_device(16, capability)
        check_cross(kernels, 20, 1100, 64, BF16, "none", with_bias=False)


@pytest.mark.parametrize("capability", [MMA, WGMMA])
@pytest.mark.parametrize(("scale", "unit"), [(1000.0, True), (1.0, False), (0.1, True), (42.0, True), (30.0, False)])
def test_any_temperature_and_raw_rows(kernels, emulated, capability, scale, unit):
    emulated.set_device(4, capability)
    check_self(kernels, 90, 64, BF16, scale=scale, unit=unit)


@pytest.mark.parametrize("capability", [MMA, WGMMA])
@pytest.mark.parametrize("gradient_scale", [65536.0, 1e-6])
def test_half_gradients_of_any_size(kernels, emulated, capability, gradient_scale):
    """GradScaler's factor must not overflow the weights in half precision, nor a mean over many rows underflow them."""
    emulated.set_device(4, capability)
    z = rows(140, 64, F16, 5)
    grad = torch.rand(140, generator=torch.Generator().manual_seed(1)) / 140
    lse = kernels.self_forward(z, 5.0, True)
    exact = reference.self_backward(z.double(), lse.double(), grad.double() * gradient_scale, 5.0, True)
    dz = kernels.self_backward(z, lse, grad * gradient_scale, 5.0, True)
    floor = 6e-8 * dz.numel() ** 0.5  # the smallest half number: what the result itself cannot hold
    assert (dz.double() - exact).norm() <= 2 * (exact.to(F16).double() - exact).norm() + 1e-3 * exact.norm() + floor


@pytest.mark.parametrize("capability", [MMA, WGMMA])
def test_rows_without_allowed_columns(kernels, emulated, capability):
    emulated.set_device(4, capability)
    a, b = rows(70, 64, BF16, 1), rows(80, 64, BF16, 2)
    row_labels, column_labels = torch.zeros(70, dtype=torch.int64), torch.zeros(80, dtype=torch.int64)
    row_labels[3] = 1
    lse = kernels.cross_forward(a, b, None, None, row_labels, column_labels, 10.0)
    assert (lse == -torch.inf).sum() == 69
    assert lse[3].isfinite()
    da, db, _ = kernels.cross_backward(a, b, None, None, row_labels, column_labels, lse, torch.ones(70), 10.0, (True, True, False))
    assert da.isfinite().all()
    assert db.isfinite().all()
    assert da[3].any()
    da[3] = 0
    assert not da.any()


@pytest.mark.parametrize("capability", [MMA, WGMMA])
@pytest.mark.parametrize("unit", [True, False])
def test_nan_is_never_hidden(kernels, emulated, capability, unit):
    emulated.set_device(4, capability)
    z = rows(70, 64, BF16, 1)
    z[5, 7] = torch.nan
    assert kernels.self_forward(z, 10.0, unit).isnan().all()


def test_a_driver_that_cannot_load_the_kernels_is_named(emulated, monkeypatch):
    """So that backend="auto" goes on to another, and does not raise in every call."""
    monkeypatch.setattr(backend, "_C", emulated)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    backend._driver_unusable.cache_clear()
    assert backend.unusable(torch.device("cuda", 0), BF16, 64) is None
    emulated.set_driver_fault("the provided PTX was compiled with an unsupported toolchain.")
    assert backend.unusable(torch.device("cuda", 0), BF16, 64) is None, "asked once per device"
    backend._driver_unusable.cache_clear()
    assert "unsupported toolchain" in backend.unusable(torch.device("cuda", 0), BF16, 64)
    emulated.set_driver_fault("")
    backend._driver_unusable.cache_clear()


def test_tf32_follows_the_matmul_precision(kernels, emulated):
    emulated.set_device(4, MMA)
    z = rows(70, 48, F32, 1)
    exact = reference.self_forward(z.double(), 10.0, True)
    errors = {}
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        errors[precision] = (kernels.self_forward(z, 10.0, True).double() - exact).abs().max().item()
    torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 3e-6
    assert 1e-5 < errors["high"] < 3e-3


# Tensor cores round toward zero when they add. Terms of one sign show it: summed in their accumulators alone, a result comes out too small
# by 2^-25 for each addition on the way, three per step of 8 in single precision.


@pytest.mark.parametrize("depth", [256, 512, 1024])
def test_long_logits_in_single_precision(kernels, emulated, depth):
    emulated.set_device(4, MMA)
    a, b = rows(20, depth, F32, 1).abs(), rows(70, depth, F32, 2).abs()
    exact = reference.cross_forward(a.double(), b.double(), None, None, None, None, 50.0)
    lse = kernels.cross_forward(a, b, None, None, None, None, 50.0)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("streamed", "depth"), [(2100, 40), (2100, 100), (1300, 200)])
def test_long_gradients_in_single_precision(kernels, emulated, streamed, depth):
    emulated.set_device(0, MMA)  # the columns are not split
    a, b = rows(20, depth, F32, 1).abs(), rows(streamed, depth, F32, 2).abs()
    grad = torch.rand(20, generator=torch.Generator().manual_seed(3))
    exact_lse = reference.cross_forward(a.double(), b.double(), None, None, None, None, 20.0)
    for needs in ((True, False, False), (False, True, False)):
        da, db, _ = kernels.cross_backward(a, b, None, None, None, None, exact_lse.float(), grad, 20.0, needs)
        wide = (a.double(), b.double(), None, None, None, None, exact_lse, grad.double(), 20.0, needs)
        exact = next(out for out in reference.cross_backward(*wide) if out is not None)
        assert_as_good_as_plain(da if needs[0] else db, exact.to(F32), exact, F32)


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
