"""Whether fp32 products may use TF32: torch has two interfaces that set it, and asking the one raises once the other was used."""

import subprocess
import sys

import pytest

SETTINGS = {  # statement on torch, whether TF32 may then be used
    "pass": False,
    "torch.set_float32_matmul_precision('highest')": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('medium')": True,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cuda.matmul.allow_tf32 = False": False,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
}
# Each setting in a process of its own, forked: what was set cannot be unset.
ASK = """
import os, sys
import torch
from fastsupcon.backends import triton
from fastsupcon.backends._dtypes import tf32_allowed
gpu = triton.Gpu("hopper", 132, {False: "tf32x3", True: "tf32"})
for setting in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(setting)
        print(tf32_allowed(), triton._precision(gpu, torch.float32), triton._precision(gpu, torch.bfloat16), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="asks in forked processes")
def test_both_interfaces_are_followed():
    asked = subprocess.run([sys.executable, "-c", ASK, *SETTINGS], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [f"{allowed} {'tf32' if allowed else 'tf32x3'} ieee" for allowed in SETTINGS.values()]
    assert dict(zip(SETTINGS, asked, strict=True)) == dict(zip(SETTINGS, expected, strict=True))
