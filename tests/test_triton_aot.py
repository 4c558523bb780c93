"""Every Triton kernel compiled ahead of time, no GPU needed: no spills, shared memory within the GPU's, tensor cores in use.

Passes with Triton 3.6 and 3.9. A process that interprets kernels (conftest.py) cannot compile them: there, this file runs in a process of
its own. For the readings themselves, of any form, GPU, dtype and D, see triton_ahead.py.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from triton_ahead import SHARED, TENSOR_CORES, WITHOUT_PRODUCT, compile_ahead

NVIDIA = (80, 90, 100)
SELF = ("triangle", "forward self", "gradient symmetric", "gradient both")
CROSS = ("forward labels, bias", "gradient rows, labels, bias", "gradient columns, labels, bias")  # the most registers of each
FEWER = (  # what else is compiled in, or left out
    *("forward fixed", "forward skip", "gradient symmetric, in splits", "gradient rows", "gradient rows, skip"),
    *("gradient columns, skip", "gradient columns, bias alone"),
)


def cases(forms, gpus, dtypes, depths):
    return list(itertools.product(forms, gpus, dtypes, depths))


CASES = [
    *cases(("triangle", "gradient symmetric"), NVIDIA, ["bf16"], [64, 128, 256]),
    *cases(("forward self", "gradient both"), NVIDIA, ["bf16"], [128]),
    *cases(CROSS, NVIDIA, ["bf16"], [128]),
    *cases(CROSS, [90], ["bf16"], [256]),
    *cases(FEWER, [90], ["bf16"], [128]),
    *cases(("triangle", "gradient symmetric", CROSS[2]), [90], ["fp16"], [128]),
    *cases(("triangle", "forward self", "gradient symmetric"), [90], ["bf16"], [512]),
    *cases(("triangle", CROSS[0], "gradient symmetric"), [86], ["bf16"], [256]),
    *cases(("triangle", CROSS[0], "gradient symmetric", "gradient both", CROSS[2]), ["gfx942"], ["bf16"], [128]),
    *cases(("triangle", "gradient symmetric", CROSS[2]), ["gfx942"], ["bf16"], [256]),
    *cases(("triangle", "forward self", "gradient symmetric", CROSS[2]), [80, 90], ["fp32"], [128]),
    ("gradient symmetric", 90, "bf16", 100),  # D is no power of two
]
#: Bytes. With Triton 3.9, ptxas keeps to 128 registers here, for two blocks on a multiprocessor, and carries one of the epilogue's offsets
#: past the loops in local memory: one store, one load.
EPILOGUE = {("gradient both", 100, "bf16", 128): 8, ("gradient rows, labels, bias", 100, "bf16", 128): 8}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="this process compiles kernels itself")
def test_in_its_own_process():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:]


@pytest.mark.skipif(INTERPRETED, reason="runs in the process that test_in_its_own_process starts")
@pytest.mark.parametrize("form, gpu, dtype, depth", CASES)
def test_no_spills_and_tensor_cores(form, gpu, dtype, depth):
    reading = compile_ahead(form, gpu, dtype, depth)
    assert reading.spilled <= EPILOGUE.get((form, gpu, dtype, depth), 0)
    assert reading.shared <= SHARED[gpu] * 1024
    if dtype == "fp32":
        assert "tf32" in reading.machine_code
    else:
        assert TENSOR_CORES[gpu] in reading.machine_code


@pytest.mark.skipif(INTERPRETED, reason="runs in the process that test_in_its_own_process starts")
@pytest.mark.parametrize("form, gpu, dtype, depth", cases(("forward self", "gradient symmetric"), NVIDIA, ["fp32"], [128]))
def test_single_precision_is_not_summed_in_the_tensor_cores(form, gpu, dtype, depth):
    """They round toward zero when they add. A tile's three products start from zero, and fp32 additions carry the sum from tile to tile."""
    reading = compile_ahead(form, gpu, dtype, depth)
    if gpu == 100:  # accumulators in tensor memory; the fourth operand says whether to add to them
        added = re.findall(r"tc_gen5_mma %[\w#:]+, %[\w#:]+, %[\w#:]+(?:\[[^]]*\])?, (%\w+)", reading.intermediate)
        assert len(added) > 0
        assert added.count("%false") == len(added) / 3
    else:
        sums = re.findall(r"(?:tt\.dot|warp_group_dot) %[\w#:]+, %[\w#:]+, %([\w#:]+)", reading.intermediate)
        assert len(sums) > 0
        assert sum(name.startswith("cst") for name in sums) == len(sums) / 3
        loops = re.findall(r"iter_args\((.*?)\) ->", reading.intermediate)
        assert len(loops) > 0
        assert not set(sums) & {name for carried in loops for name in re.findall(r"%([\w#]+) =", carried)}
        assert len(re.findall(r"add(?:\.rn)?(?:\.ftz)?\.f32", reading.machine_code)) >= 16  # of a thread's sums


@pytest.mark.skipif(INTERPRETED, reason="runs in the process that test_in_its_own_process starts")
@pytest.mark.parametrize("gpu", [90, "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("form", WITHOUT_PRODUCT)
def test_kernels_without_a_product(form, gpu, dtype):
    assert compile_ahead(form, gpu, dtype, 128).spilled == 0
