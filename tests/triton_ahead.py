"""The Triton kernels compiled ahead of time, as the backend launches them, and what the compiler says of each; no GPU needed.

python tests/triton_ahead.py [word ...]     a line for each form, GPU, dtype and D that holds all words ("gfx942 bf16 256")
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fastsupcon.backends._triton_forward import forward_kernel, join_kernel
from fastsupcon.backends._triton_gradient import BOTH, COLUMNS, ROWS, SYMMETRIC, gradient_kernel, prepare_kernel
from fastsupcon.backends._triton_table import family, gradient_width, tile
from fastsupcon.backends._triton_tiles import EQUAL_KEYS, ITSELF, NONE
from fastsupcon.backends._triton_triangle import GROUPS, triangle_kernel

SHARED = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KiB a block may use
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync", "gfx942": "v_mfma"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEPTHS = (64, 128, 256, 512)


class Form(NamedTuple):
    """A kernel with the pointers that are given, by their types; "rows" is the rows' own type. Other pointers are None."""

    kernel: object
    pointers: dict[str, str]
    constants: dict[str, object]


_FORWARD = {"a_ptr": "rows", "b_ptr": "rows", "lse_ptr": "fp32"}
_GRADIENT = {"x_ptr": "rows", "y_ptr": "rows", "weight_ptr": "fp32", "peak_ptr": "fp16 alone", "dx_ptr": "rows"}
_BOTH = _GRADIENT | {"lse_ptr": "fp32"}
_COLUMNS = _BOTH | {"dbias_ptr": "fp32"}
FORMS = {
    "triangle": Form(triangle_kernel, {"z_ptr": "rows", "partial_ptr": "fp32"}, {"GROUP": GROUPS[-1]}),
    "forward self": Form(forward_kernel, _FORWARD, {"FORBIDDEN": ITSELF, "FIXED": False}),
    "forward fixed": Form(forward_kernel, _FORWARD, {"FORBIDDEN": ITSELF, "FIXED": True}),
    "forward bias": Form(forward_kernel, _FORWARD | {"bias_ptr": "fp32"}, {"FORBIDDEN": NONE, "FIXED": False}),
    "forward skip": Form(forward_kernel, _FORWARD | {"a_key_ptr": "i64"}, {"FORBIDDEN": EQUAL_KEYS, "FIXED": False}),
    "forward labels, bias": Form(
        forward_kernel, _FORWARD | dict.fromkeys(("a_key_ptr", "b_key_ptr"), "i64") | {"bias_ptr": "fp32"},
        {"FORBIDDEN": EQUAL_KEYS, "FIXED": False},
    ),
    "gradient symmetric": Form(gradient_kernel, _GRADIENT, {"FORBIDDEN": ITSELF, "WEIGHT": SYMMETRIC}),
    "gradient symmetric, in splits": Form(gradient_kernel, _GRADIENT | {"dx_ptr": "fp32"}, {"FORBIDDEN": ITSELF, "WEIGHT": SYMMETRIC}),
    "gradient both": Form(gradient_kernel, _BOTH, {"FORBIDDEN": ITSELF, "WEIGHT": BOTH}),
    "gradient rows": Form(gradient_kernel, _BOTH, {"FORBIDDEN": NONE, "WEIGHT": ROWS}),
    "gradient rows, bias": Form(gradient_kernel, _BOTH | {"y_bias_ptr": "fp32"}, {"FORBIDDEN": NONE, "WEIGHT": ROWS}),
    "gradient rows, skip": Form(gradient_kernel, _BOTH | {"x_key_ptr": "i64"}, {"FORBIDDEN": EQUAL_KEYS, "WEIGHT": ROWS}),
    "gradient rows, labels, bias": Form(
        gradient_kernel, _BOTH | dict.fromkeys(("x_key_ptr", "y_key_ptr"), "i64") | {"y_bias_ptr": "fp32"},
        {"FORBIDDEN": EQUAL_KEYS, "WEIGHT": ROWS},
    ),
    "gradient columns, bias": Form(gradient_kernel, _COLUMNS | {"x_bias_ptr": "fp32"}, {"FORBIDDEN": NONE, "WEIGHT": COLUMNS}),
    "gradient columns, bias alone": Form(  # dx is not needed
        gradient_kernel, {name: kind for name, kind in _COLUMNS.items() if name != "dx_ptr"} | {"x_bias_ptr": "fp32"},
        {"FORBIDDEN": NONE, "WEIGHT": COLUMNS},
    ),
    "gradient columns, skip": Form(gradient_kernel, _BOTH | {"y_key_ptr": "i64"}, {"FORBIDDEN": EQUAL_KEYS, "WEIGHT": COLUMNS}),
    "gradient columns, labels, bias": Form(
        gradient_kernel, _COLUMNS | dict.fromkeys(("x_key_ptr", "y_key_ptr"), "i64") | {"x_bias_ptr": "fp32"},
        {"FORBIDDEN": EQUAL_KEYS, "WEIGHT": COLUMNS},
    ),
    "prepare": Form(prepare_kernel, dict.fromkeys(("lse_ptr", "grad_ptr", "safe_lse_ptr", "weight_ptr"), "fp32"), {"BLOCK": 1024}),
    "prepare symmetric": Form(
        prepare_kernel, dict.fromkeys(("lse_ptr", "grad_ptr", "weight_ptr"), "fp32") | {"peak_ptr": "fp16 alone"}, {"BLOCK": 1024}
    ),
    "join": Form(join_kernel, dict.fromkeys(("partial_ptr", "lse_ptr"), "fp32"), {"ROWS": 32, "SPLITS": 64}),
}  # fmt: skip
WITHOUT_PRODUCT = tuple(form for form in FORMS if form.split()[0] in ("prepare", "join"))  # 4 warps, whatever the rows


class Reading(NamedTuple):
    registers: int  # a thread
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes a block
    machine_code: str  # PTX, or AMD's assembly
    intermediate: str  # Triton's, for the GPU


def compile_ahead(form: str, arch: int | str, dtype: str, depth: int) -> Reading:
    """``form`` for GPU ``arch``, with the table's tile and aligned pointers."""
    kernel, pointers, constants = FORMS[form]
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    rows = DTYPES[dtype]
    name = "symmetric gradient" if form.startswith("gradient symmetric") else form.split()[0]
    t = tile(name, family(target.backend, arch), rows, depth)
    precision = "tf32x3" if dtype == "fp32" and target.backend == "cuda" else "ieee"
    types = {name: f"*{dtype if kind == 'rows' else kind}" for name, kind in pointers.items() if kind != "fp16 alone"}
    if dtype == "fp16" and "peak_ptr" in pointers:
        types["peak_ptr"] = "*fp32"
    aligned = [name for name in kernel.arg_names if name in types]
    types |= dict.fromkeys(("n", "m", "groups", "splits", "tiles_per_split"), "i32") | {"scale": "fp32"}
    constants = {name: getattr(value, "value", value) for name, value in constants.items()}  # out of tl.constexpr
    constants |= {"D": depth, "OWNED": t.owned, "STREAMED": t.streamed, "DEPTH": t.depth, "PRECISION": precision}
    constants["WIDTH"] = gradient_width(rows, depth, t)
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): constants.get(name) for name in names if name not in types}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": 4} if form in WITHOUT_PRODUCT else {"num_warps": t.warps, "num_stages": t.stages}
    compiled = triton.compile(ASTSource(kernel, signature, values, attributes), target=target, options=options)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size"))
        return Reading(registers, spilled, compiled.metadata.shared, text, compiled.asm["ttgir"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK"))
    return Reading(registers, spilled, compiled.metadata.shared, compiled.asm["ptx"], compiled.asm["ttgir"])


if __name__ == "__main__":
    print(f"Triton {triton.__version__}: registers, spilled bytes, KiB of shared memory; ! where something is wrong")
    for dtype, depth, arch, form in itertools.product(DTYPES, DEPTHS, SHARED, FORMS):
        line = f"{form:32} {arch!s:7} {dtype} {depth:5}"
        if all(word in line.split() + [form] for word in sys.argv[1:]):
            reading = compile_ahead(form, arch, dtype, depth)
            fits = reading.spilled == 0 and reading.shared <= SHARED[arch] * 1024
            fine = fits and (form in WITHOUT_PRODUCT or TENSOR_CORES[arch] in reading.machine_code)
            print(f"{line} {reading.registers:4} {reading.spilled:5} {reading.shared / 1024:7.1f} {'' if fine else '!'}", flush=True)
