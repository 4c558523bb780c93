"""What nvcc and ptxas say of the CUDA kernels: they compile for every generation, keep to registers, and use the tensor cores meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastsupcon.backends._extension import module as extension

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
GENERATIONS = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"]
UNITS = {"plan": GENERATIONS, "mma_bf16": GENERATIONS, "mma_f32": GENERATIONS, "wgmma_bf16": GENERATIONS[1:]}  # f16 is as bf16, tf32 as f32
# Forward and backward of each depth, for both architectures; in plan the small kernels, of which two are there for each of four products.
KERNELS = {"plan": 2 * (2 * 4 + 4), "mma_bf16": 2 * 2 * 4, "mma_f32": 2 * 2 * 3, "wgmma_bf16": 2 * 3 + 3}


def find_tool(name: str) -> str | None:
    """From PATH, beside nvcc, or in the copy that triton's package carries."""
    found = shutil.which(name)
    if found is None and (nvcc := shutil.which("nvcc")):
        found = shutil.which(name, path=str(Path(nvcc).resolve().parent))
    if found is None:
        triton = pytest.importorskip("triton", reason=f"no {name} on PATH, none beside nvcc, and no triton to lend one")
        found = shutil.which(name, path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Object file and ptxas report of each unit."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or not SOURCES.is_dir():
        pytest.skip("nvcc or the sources are not here")
    out = tmp_path_factory.mktemp("cuda")

    def compile_unit(unit: str) -> tuple[Path, str]:
        target = out / f"{unit}.o"
        command = [nvcc, "-std=c++17", f"-I{SOURCES}", f"-I{SOURCES.parent}", *UNITS[unit], "-Xptxas", "-v", "-c", "-o", str(target)]
        command.append(str(SOURCES / f"{unit}.cu"))
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target, done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(UNITS, pool.map(compile_unit, UNITS), strict=True))


def spills(report: str) -> dict[str, int]:
    """Bytes spilled (stores and loads) by kernel and architecture."""
    entry = r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    return {f"{name} {arch}": int(stores) + int(loads) for name, arch, stores, loads in re.findall(entry, report, re.DOTALL)}


@pytest.mark.parametrize("unit", list(UNITS))
def test_kernels_keep_to_registers(compiled, unit):
    """None is spilled, but for a few that do not change in the ring's backward of half rows, deeper than 256: read again once a tile."""
    found = spills(compiled[unit][1])
    assert len(found) == KERNELS[unit]
    assert all("sm_80" in name or "sm_90a" in name for name in found)
    spilled = {name: size for name, size in found.items() if size}
    assert all("mma_backward" in name and "Li0E" in name and unit == "mma_bf16" for name in spilled)
    assert sum(spilled.values()) < 2 * 160


def test_wgmma_is_asynchronous(compiled):
    """ptxas says C7514 or C7515 where it waits after every wgmma, C7508 where it ignores setmaxnreg."""
    report = compiled["wgmma_bf16"][1]
    assert "serialized" not in report
    assert not re.search(r"C75\d\d", report)


@pytest.mark.parametrize(
    ("unit", "instruction"), [("mma_bf16", "HMMA.16816.F32.BF16"), ("mma_f32", "HMMA.1688.F32.TF32"), ("wgmma_bf16", "HGMMA")]
)
def test_machine_code_uses_the_tensor_cores(compiled, unit, instruction):
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH, beside nvcc or in triton")
    code = subprocess.run([cuobjdump, "-sass", str(compiled[unit][0])], capture_output=True, text=True, check=True).stdout
    kernels = code.split("Function : ")[1:]
    assert kernels
    assert all(instruction in kernel for kernel in kernels)
    if unit == "wgmma_bf16":  # TMA, and the second product's row-major operand
        assert all("UTMALDG" in kernel for kernel in kernels)
        assert all(".tnspB" in kernel for kernel in kernels if "backward" in kernel.split("\n", 1)[0])


def test_single_precision_is_not_summed_in_the_tensor_cores(compiled):
    """One in six products starts a sum of its own (accumulator RZ): two steps of three, added to the long sum by FADD, to nearest."""
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH, beside nvcc or in triton")
    code = subprocess.run([cuobjdump, "-sass", str(compiled["mma_f32"][0])], capture_output=True, text=True, check=True).stdout
    for kernel in code.split("Function : ")[1:]:
        accumulators = [operands.split(",")[3].strip() for operands in re.findall(r"HMMA\S+ ([^;]+?) *;", kernel)]
        assert len(accumulators) in (96, 288, 240, 480)  # forward; backward of 2 panels, of 4, of the ring
        assert accumulators.count("RZ") == len(accumulators) / 6


def test_an_nvcc_that_is_too_old_leaves_the_cpu_kernels(tmp_path):
    """With 11.8 there is no wgmma: the installation must not fail for that."""
    nvcc, cmake, pybind11 = shutil.which("nvcc"), shutil.which("cmake"), pytest.importorskip("pybind11")
    if nvcc is None or cmake is None or shutil.which("ninja") is None or not SOURCES.is_dir():
        pytest.skip("nvcc, cmake, ninja or the sources are not here")
    older = tmp_path / "nvcc"  # CMake reads the version out of a program that it compiles
    edit = r"sed -i 's/compiler_version\[[0-9]*\.[0-9]*/compiler_version[00000011.00000008/' a.out"
    older.write_text(f'#!/bin/sh\n{nvcc} "$@" || exit\n[ ! -f a.out ] || {edit}\n')
    older.chmod(0o755)
    command = [cmake, f"-S{SOURCES.parents[1]}", f"-B{tmp_path / 'build'}", "-GNinja", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_CUDA_COMPILER={older}"]
    configured = subprocess.run(command, capture_output=True, text=True)
    assert configured.returncode == 0, configured.stderr
    assert re.search(r"nvcc 11\.8\.\d+ is older than 12\.0, building the CPU kernels alone", configured.stdout)
    assert "fastsupcon_cuda" not in (tmp_path / "build" / "build.ninja").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_the_extension_says_so():
    if not hasattr(extension, "cuda"):
        pytest.skip("the extension was built without CUDA")
    for _ in range(2):  # the error is cleared
        assert extension.cuda.unusable(0).startswith("CUDA driver version is insufficient for CUDA runtime version")


def test_newer_generations_get_ptx(compiled):
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH, beside nvcc or in triton")
    listing = subprocess.run([cuobjdump, "-lptx", str(compiled["mma_bf16"][0])], capture_output=True, text=True, check=True).stdout
    assert "sm_80.ptx" in listing
