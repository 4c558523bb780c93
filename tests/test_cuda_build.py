"""What the built extension holds of the CUDA kernels: code for every generation, in registers, by the tensor cores that are meant."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsupcon.backends._extension import module as extension

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
# Forward and backward of each depth for each of four products, and the small kernels, of which two more are there for each product.
SMALL = 5
MMA = 4 + 4 + 3 + 3  # depths of f16, bf16, tf32, f32
# Of f16 and bf16, apart and not: 1, 2, 4 panels and the deep ones, backward with the scale's gradient and without; triangles.
WGMMA = 2 * 2 * (3 + 2 + 2 * (3 + 3)) + 2 * 5
KERNELS = {"sm_80": 2 * MMA + 2 * 4 + SMALL, "sm_90a": 2 * MMA + 2 * 4 + SMALL + WGMMA}


def cuobjdump(*arguments: str) -> str:
    """From PATH, beside nvcc, or the copy that triton's package carries."""
    if not hasattr(extension, "cuda"):
        pytest.skip("the extension was built without CUDA")
    found = shutil.which("cuobjdump")
    if found is None and (nvcc := shutil.which("nvcc")):
        found = shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent))
    if found is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump on PATH, none beside nvcc, and no triton to lend one")
        found = shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        pytest.skip("no cuobjdump on PATH, beside nvcc or in triton")
    return subprocess.run([found, *arguments, extension.__file__], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def hopper() -> dict[str, str]:
    """The machine code of sm_90a, by kernel."""
    return {
        name: code
        for name, _, code in (kernel.partition("\n") for kernel in cuobjdump("-sass", "-arch", "sm_90a").split("Function : ")[1:])
    }


def test_kernels_keep_to_registers():
    """None is spilled, but for a few that do not change and are read again once a tile: in the rings, where the result of 6 panels leaves
    no more, in single precision at 4 panels, one of f16's factors, and where wgmma's backward sums the scale's gradient too."""
    found = {arch: [] for arch in KERNELS}
    for part in cuobjdump("-res-usage").split("arch = ")[1:]:
        arch = part.split("\n", 1)[0]
        found[arch] += [
            (name, int(stack) + int(local))
            for name, stack, local in re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+).*?LOCAL:(\d+)", part)
        ]
    assert {arch: len(kernels) for arch, kernels in found.items()} == KERNELS
    spilled = {name: size for kernels in found.values() for name, size in kernels if size}
    few = {r"\d+mma_\w+ILN\w+ELi0E": 40, r"11mma_forward\w+E3ELi4E": 56, "deep_backward.*ELi6E": 112, r"14wgmma_backward\w+E0ELi4ELb0E": 8}
    few |= {"14wgmma_backward.*ELb1EEEv": 40, "deep_backward.*ELi6E.*ELb1EEEv": 152}
    for name, size in spilled.items():
        assert any(re.search(kernel, name) and size <= most for kernel, most in few.items()), (name, size)


# The tests of Hopper's machine code are all marked long: apart from each other, they would disassemble it anew.
@pytest.mark.long
def test_wgmma_is_asynchronous(hopper):
    """At least four products for each wait: where ptxas serialises them, one waits for the other."""
    found = {name: code for name, code in hopper.items() if "wgmma" in name}
    assert len(found) == WGMMA
    for name, code in found.items():
        assert code.count("HGMMA") >= 4 * code.count("WARPGROUP.DEPBAR") > 0, name
        assert "UTMALDG" in code, name
        assert ("backward" not in name) or ".tnspB" in code, name  # the second product's row-major operand


@pytest.mark.long
@pytest.mark.parametrize(
    ("product", "instruction"), [(0, "HMMA.16816.F32"), (1, "HMMA.16816.F32.BF16"), (2, "HMMA.1688.F32.TF32"), (3, "HMMA.1688.F32.TF32")]
)
def test_products_use_the_tensor_cores(hopper, product, instruction):
    found = [code for name, code in hopper.items() if "mma_" in name and "wgmma" not in name and f"ProductE{product}E" in name]
    assert len(found) == 2 * (4 if product < 2 else 3)
    assert all(instruction in code for code in found)


@pytest.mark.long
def test_single_precision_is_not_summed_in_the_tensor_cores(hopper):
    """One in six products starts a sum of its own (accumulator RZ): two steps of three, added to the long sum by FADD, to nearest."""
    for name, code in hopper.items():
        if "mma_" in name and "ProductE3E" in name:
            accumulators = [operands.split(",")[3].strip() for operands in re.findall(r"HMMA\S+ ([^;]+?) *;", code)]
            assert len(accumulators) in (96, 288, 240, 480)  # forward; backward of 2 panels, of 4, of the ring
            assert accumulators.count("RZ") == len(accumulators) / 6


def test_newer_generations_get_ptx():
    assert "sm_80.ptx" in cuobjdump("-lptx")


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    cmake, pybind11 = shutil.which("cmake"), pytest.importorskip("pybind11")
    if cmake is None or shutil.which("ninja") is None or not SOURCES.is_dir():
        pytest.skip("cmake, ninja or the sources are not here")
    command = [cmake, f"-S{SOURCES.parents[1]}", f"-B{build}", "-GNinja", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("by", ["CUDACXX", "PATH"])
def test_an_nvcc_that_does_not_work_is_an_error(tmp_path, by):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    found = {"CUDACXX": str(broken)} if by == "CUDACXX" else {"CUDACXX": "", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    configured = configure(tmp_path / "build", **found)
    assert configured.returncode == 1 and f"fastsupcon: {broken} does not work" in " ".join(configured.stderr.split())


def test_an_nvcc_that_is_too_old_leaves_the_cpu_kernels(tmp_path):
    """With 11.8 there is no wgmma: the installation must not fail for that."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    older = tmp_path / "nvcc"  # CMake reads the version out of a program that it compiles
    edit = r"sed -i 's/compiler_version\[[0-9]*\.[0-9]*/compiler_version[00000011.00000008/' a.out"
    older.write_text(f'#!/bin/sh\n{nvcc} "$@" || exit\n[ ! -f a.out ] || {edit}\n')
    older.chmod(0o755)
    configured = configure(tmp_path / "build", f"-DCMAKE_CUDA_COMPILER={older}")
    assert configured.returncode == 0, configured.stderr
    assert re.search(r"the CPU kernels alone: nvcc 11\.8\.\d+ was found at build time, older than 12\.0", configured.stdout)
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "fastsupcon_cuda" not in rules and "nvcc 11.8" in rules  # which the extension is told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_the_extension_says_so():
    if not hasattr(extension, "cuda"):
        pytest.skip("the extension was built without CUDA")
    for _ in range(2):  # the error is cleared
        assert extension.cuda.unusable(0).startswith("CUDA driver version is insufficient for CUDA runtime version")
