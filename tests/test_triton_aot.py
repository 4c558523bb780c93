"""Every Triton kernel compiled ahead of time as a step launches it, no GPU needed: no spills, shared memory that fits, tensor cores in use.

A process that interprets kernels (conftest.py) cannot compile them: there, this file runs in a process of its own. For the readings
themselves, of any form, GPU, dtype and D, see triton_ahead.py.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton_ahead import DTYPES, FORMS, PRODUCTS, SHARED, TENSOR_CORES, backend, compile_ahead, recorded, step

from fastsupcon.backends.triton import launch

NVIDIA = (80, 90, 100)
CASES = [
    *itertools.product(("SCL", "PSC, 10 classes"), (*NVIDIA, "gfx942"), ["bf16"], [128]),
    *itertools.product(("SCL, learned", "SCL, running", "CLIP"), [80, 90], ["bf16"], [128]),  # CLIP: two sets and a learned scale
    ("SCL", 90, "fp16", 100),  # D is no power of two
    ("SCL", 90, "fp32", 128),
    *itertools.product(("SCL", "PSC, 1000 classes"), [90], ["bf16"], [256, 512]),
    ("everything", 90, "bf16", 128),
    ("rows alone", 90, "bf16", 128),
]
#: Bytes, of what the epilogue needs: stored before the loop and loaded after it, of the last three numbers a tile; at depth 256 on Hopper
#: of a tile that is 7 % faster than the largest that spills nothing.
EPILOGUE = {("SCL", 90, "bf16", 256): 320, ("SCL", 100, "bf16", 128): 64, ("PSC, 1000 classes", 90, "bf16", 512): 72}
#: Of half rows' forward on Hopper: on an H200 these tiles take two thirds of the time of those that spill nothing.
MEASURED = 560
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="runs in the process that test_in_its_own_process starts")


@pytest.mark.long
@pytest.mark.skipif(not INTERPRETED, reason="this process compiles kernels itself")
def test_in_its_own_process():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:]


@compiles
@pytest.mark.parametrize("form, gpu, dtype, depth", CASES)
def test_no_spills_and_tensor_cores(form, gpu, dtype, depth):
    """Of the forms that have all kinds of kernels, all; of the others those with a product, which alone are short of registers."""
    kernels = () if form in ("SCL", "everything") else PRODUCTS
    for reading in compile_ahead(form, gpu, dtype, depth, kernels):
        faster = gpu == 90 and dtype != "fp32" and reading.kernel == "forward_kernel"
        assert reading.spilled <= (MEASURED if faster else EPILOGUE.get((form, gpu, dtype, depth), 0)), reading.kernel
        assert reading.shared <= SHARED[gpu] * 1024, reading.kernel
        if reading.has_product:
            assert ("tf32" if dtype == "fp32" else TENSOR_CORES[gpu]) in reading.machine_code, reading.kernel


@compiles
@pytest.mark.parametrize("gpu", NVIDIA)
def test_single_precision_is_not_summed_in_the_tensor_cores(gpu):
    """They round toward zero when they add. A tile's three products start from zero, and fp32 additions carry the sum from tile to tile."""
    for reading in compile_ahead("SCL", gpu, "fp32", 128, ("forward_kernel", "gradient_kernel")):
        if gpu == 100:  # accumulators in tensor memory: the fourth operand says whether to add to them, or they are zeroed before
            added = re.findall(r"tc_gen5_mma %[\w#:]+, %[\w#:]+, %[\w#:]+(?:\[[^]]*\])?, (%\w+)", reading.intermediate)
            zeroed = re.findall(r"tmem_store (%cst\w*), %\w+, %true", reading.intermediate)
            assert len(added) > 0
            assert all(f"{name} = arith.constant dense<0.000000e+00>" in reading.intermediate for name in zeroed)
            assert added.count("%false") + len(zeroed) == len(added) / 3
        else:
            sums = re.findall(r"(?:tt\.dot|warp_group_dot) %[\w#:]+, %[\w#:]+, %([\w#:]+)", reading.intermediate)
            assert len(sums) > 0
            assert sum(name.startswith("cst") for name in sums) == len(sums) / 3
            loops = re.findall(r"iter_args\((.*?)\) ->", reading.intermediate)
            assert len(loops) > 0
            assert not set(sums) & {name for carried in loops for name in re.findall(r"%([\w#]+) =", carried)}
            assert len(re.findall(r"add(?:\.rn)?(?:\.ftz)?\.f32", reading.machine_code)) >= 16  # of a thread's sums


@compiles
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_kernels_are_not_specialised_on_integers(form):
    """Launches of other sizes go to the kernels that are kept (launch.py), and no size compiles anew."""
    with recorded(backend.Gpu("hopper", 132, ("tf32x3", "tf32x3"))) as launches:
        step(form, torch.float16, 128)
    for kernel, arguments in launches:
        for parameter in kernel.params:
            if type(arguments[parameter.name]) is int and not parameter.is_constexpr:
                assert parameter.do_not_specialize, (kernel.__name__, parameter.name)


class Pointer:
    """What Triton looks at in a tensor."""

    def __init__(self, address, dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self):
        return self.address


@compiles
def test_kept_kernels_are_those_that_triton_would_launch(monkeypatch):
    """Two launches have one key in launch.py where Triton launches the same kernel, and only there."""
    planned, mine, tritons = [], {}, {}
    monkeypatch.setattr(launch.Plan, "run", lambda plan, values, device: planned.append(plan))
    with recorded(backend.Gpu("hopper", 132, ("tf32x3", "tf32"))):
        for form, dtype, n, depth in itertools.product(FORMS.values(), DTYPES.values(), (1, 33, 2048, 65536), (24, 128)):
            step(form._replace(n=n), dtype, depth)
    nvidia = make_backend(GPUTarget("cuda", 90, 32))
    binder = functools.cache(lambda kernel: create_function_from_signature(kernel.signature, kernel.params, nvidia))
    for plan in planned:
        for off in ((), *(((name, 4),) for name in plan.tensors)):
            for each in plan.launches:
                arguments = dict(each.arguments)
                for name, x in each.given:
                    at = isinstance(x, launch.At)
                    arguments[name] = Pointer(4096 + dict(off).get(x.name, 0) + x.offset, x.dtype) if at else 1.0
                _, specialisation, options = binder(each.kernel)(**arguments, **each.options)
                key, theirs = each.key(off, torch.device("cuda", 0)), (each.kernel.__name__, str(specialisation), str(options))
                assert mine.setdefault(key, theirs) == theirs
                assert tritons.setdefault(theirs, key) == key
