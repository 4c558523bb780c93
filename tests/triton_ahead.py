"""The Triton kernels compiled ahead of time, exactly as the backend launches them, and what the compiler says of each; no GPU needed.

python tests/triton_ahead.py [word ...]     a line for each kernel of the forms, GPUs, dtypes and D that hold all words ("gfx942 bf16 256")
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelInterface

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fastsupcon.backends import triton as backend
from fastsupcon.backends.triton.table import family
from fastsupcon.problem import LOG_SUMS, Line, Pairs, Side

SHARED = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KiB a block may use
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync", "gfx942": "v_mfma"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEPTHS = (64, 128, 256, 512)
SCL, PSC = ("all", "similarity", "count"), ("different", "similarity", "count")


class Form(NamedTuple):
    """A step of a loss: rows, columns (0: the self shape), what is asked of either, and what else the problem has."""

    n: int
    m: int
    rows: tuple[str, ...]
    columns: tuple[str, ...] = ()
    learned: bool = False
    unit: bool = True
    keys: bool = True
    bias: bool = False
    own: bool = False
    scale: float = 10.0


FORMS = {
    "SCL": Form(65536, 0, SCL),
    "SCL, few rows": Form(2048, 0, SCL),
    "SCL, learned": Form(2048, 0, SCL, learned=True),
    "SCL, running": Form(2048, 0, SCL, unit=False),
    "PSC, 10 classes": Form(1024, 10, PSC),
    "PSC, 1000 classes": Form(1024, 1000, PSC, learned=True),
    "PSC, running": Form(1024, 1000, PSC, scale=100.0),
    "CLIP": Form(4096, 4096, SCL, SCL, learned=True),
    "BCL": Form(2048, 0, ("different", "equal", "similarity", "count"), bias=True),
    "rows alone": Form(2048, 0, ("all",), unit=False, keys=False),
    "everything": Form(2048, 1024, ("all", "different", "equal", "similarity", "count"), ("all",), True, False, True, True, True),
}


PRODUCTS = ("forward_kernel", "gradient_kernel", "triangle_kernel")  # kernels that multiply rows by columns


class Reading(NamedTuple):
    kernel: str
    registers: int  # a thread
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes a block
    machine_code: str  # PTX, or AMD's assembly
    intermediate: str  # Triton's, for the GPU

    @property
    def has_product(self) -> bool:
        return self.kernel in PRODUCTS


@contextlib.contextmanager
def recorded(gpu):
    """The launches that the backend would make inside on such a GPU, as (kernel, arguments), without making them."""
    launches = []

    def launch(kernel, grid):
        def record(*arguments, **named):
            launches.append((kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | named))

        return record

    with (
        mock.patch.object(KernelInterface, "__getitem__", launch),
        mock.patch.object(backend, "_gpu", lambda device: gpu),
        mock.patch.object(backend, "_on", lambda device: contextlib.nullcontext()),
    ):
        yield launches


def step(form: Form, dtype: torch.dtype, depth: int) -> None:
    """A forward and a backward over meta tensors: of a loss, or of terms that are none's."""
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    n, m = form.n, form.m or form.n
    keys = lambda count, some: empty(count, dtype=torch.int64) if some else None  # noqa: E731
    pairs = Pairs(
        empty(n, depth, dtype=dtype), empty(m, depth, dtype=dtype) if form.m else None, empty() if form.learned else form.scale, form.unit,
        empty(m) if form.bias else None, keys(n, form.keys), keys(m, form.keys and form.m), keys(n, form.own),
    )  # fmt: skip
    needs = (True, bool(form.m), form.bias, form.learned)
    if not form.columns and "count" in form.rows:
        line = Line(**{name: 1.0 for name in LOG_SUMS if name in form.rows}, similarity=-1.0)
        _, kept = backend.loss(pairs, line.names, line, False)
        backend.loss_backward(pairs, line.names, line, kept, empty(), needs)
    else:
        terms = backend.forward(pairs, form.rows, form.columns, False)
        rows, columns = Side(form.rows, terms.rows, terms.rows), Side(form.columns, terms.columns, terms.columns)
        backend.backward(pairs, rows, columns, terms.norms, terms.kept, needs)


def compile_ahead(form: str, arch: int | str, dtype: str, depth: int, kernels: tuple[str, ...] = ()) -> list[Reading]:
    """Every kernel of a step (or those named) for GPU ``arch``, once."""
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    full, units = ("ieee", 304) if target.backend == "hip" else ("tf32x3", 132)
    gpu = backend.Gpu(family(target.backend, arch), units, (full, full))
    with recorded(gpu) as launches:
        step(FORMS[form], DTYPES[dtype], depth)
    return [compiled(kernel, arguments, target) for kernel, arguments in launches if not kernels or kernel.__name__ in kernels]


def compiled(kernel, arguments: dict, target: GPUTarget) -> Reading:
    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in arguments}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = getattr(arguments[name], "value", arguments[name])  # out of tl.constexpr
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + types[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in constant or value is None:
            signature[name] = "constexpr"
            values[(place,)] = value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    binary = triton.compile(ASTSource(kernel, signature, values, attributes), target=target, options=options)
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size"))
    else:
        text = binary.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(binary.asm["cubin"])
            cubin.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            report = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True).stdout
        registers, spilled = (int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK"))
    return Reading(kernel.__name__, registers, spilled, binary.metadata.shared, text, binary.asm["ttgir"])


if __name__ == "__main__":
    print(f"Triton {triton.__version__}: registers, spilled bytes, KiB of shared memory; ! where something is wrong")
    for dtype, depth, arch, form in itertools.product(DTYPES, DEPTHS, SHARED, FORMS):
        line = f"{form:18} {arch!s:7} {dtype} {depth:5}"
        if all(word in line.split() + [form] for word in sys.argv[1:]):
            for reading in compile_ahead(form, arch, dtype, depth):
                fits = reading.spilled == 0 and reading.shared <= SHARED[arch] * 1024
                fine = fits and (not reading.has_product or TENSOR_CORES[arch] in reading.machine_code)
                numbers = f"{reading.registers:4} {reading.spilled:5} {reading.shared / 1024:7.1f}"
                print(f"{line} {reading.kernel:22} {numbers} {'' if fine else '!'}", flush=True)
