"""Every Triton kernel compiled ahead of time, no GPU needed: no spills, shared memory within the GPU's, tensor cores in use.

A process that interprets kernels (conftest.py) cannot compile them: there, this file runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastsupcon.backends import _triton_forward, _triton_gradient, _triton_triangle  # noqa: E402
from fastsupcon.backends._triton_table import family, gradient_width, tile  # noqa: E402

POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
KERNELS = {
    "triangle": _triton_triangle.triangle_kernel,
    "forward": _triton_forward.forward_kernel,
    "gradient": _triton_gradient.gradient_kernel,
}
SHARED = {80: 163, 86: 99, 90: 227, 100: 227, "gfx942": 64}  # KiB a block may use


def compile_ahead(kernel: str, arch: int | str, dtype: torch.dtype, depth: int):
    """The self-similarity form of ``kernel``, with the table's tile, for GPU ``arch``."""
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    t = tile(kernel, family(target.backend, arch), dtype, depth)
    precision = "ieee" if dtype != torch.float32 or target.backend == "hip" else "tf32x3"
    constants = {"D": depth, "OWNED": t.owned, "STREAMED": t.streamed, "DEPTH": t.depth, "PRECISION": precision, "FORBIDDEN": 1}
    constants |= {"GROUP": 1024, "FIXED": False, "WEIGHT": _triton_gradient.SYMMETRIC.value, "WIDTH": gradient_width(dtype, depth, t)}
    types = dict.fromkeys(("z_ptr", "a_ptr", "b_ptr", "x_ptr", "y_ptr", "dx_ptr"), POINTER[dtype])
    types |= dict.fromkeys(("partial_ptr", "weight_ptr"), "*fp32") | ({} if kernel == "gradient" else {"lse_ptr": "*fp32"})
    types |= dict.fromkeys(("n", "m", "groups", "tiles_per_split"), "i32") | {"scale": "fp32"}
    names = KERNELS[kernel].arg_names
    constants = {name: constants.get(name) for name in names if name not in types}  # a pointer that is not given is None
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(KERNELS[kernel], signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=target, options={"num_warps": t.warps, "num_stages": t.stages})


def spilled_bytes(compiled, folder: Path) -> int:
    if "amdgcn" in compiled.asm:
        return int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", compiled.asm["amdgcn"])[1])
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


MAIN = [(kernel, arch, torch.bfloat16, depth) for kernel in ("triangle", "gradient") for arch in (80, 90, 100) for depth in (64, 128, 256)]
OTHER = [
    *(("forward", arch, torch.bfloat16, 128) for arch in (80, 90, 100)),
    *((kernel, 90, torch.float16, 128) for kernel in KERNELS),
    *((kernel, 90, torch.bfloat16, 512) for kernel in KERNELS),
    *((kernel, 86, torch.bfloat16, 256) for kernel in KERNELS),
    *((kernel, "gfx942", torch.bfloat16, 128) for kernel in KERNELS),
    ("gradient", 90, torch.bfloat16, 100),  # D is no power of two
]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="runs in the process that test_in_its_own_process starts")


@pytest.mark.skipif(not INTERPRETED, reason="this process compiles kernels itself")
def test_in_its_own_process():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:]


@compiles
@pytest.mark.parametrize("kernel, arch, dtype, depth", MAIN + OTHER)
def test_no_spills_and_tensor_cores(kernel, arch, dtype, depth, tmp_path):
    compiled = compile_ahead(kernel, arch, dtype, depth)
    assert spilled_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= SHARED[arch] * 1024
    instruction = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", "gfx942": "v_mfma"}[arch]
    assert instruction in compiled.asm["amdgcn" if isinstance(arch, str) else "ptx"]


@compiles
@pytest.mark.parametrize("depth", [128])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_fp32_fits_and_uses_tensor_cores(kernel, arch, depth):
    compiled = compile_ahead(kernel, arch, torch.float32, depth)
    assert compiled.metadata.shared <= SHARED[arch] * 1024
    assert "tf32" in compiled.asm["ptx"]
