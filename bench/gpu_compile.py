"""Runs the first step of the quick suite's contenders, several at once, which fills the caches of torch.compile and Triton:
``python -m bench.gpu_compile``. The suite then finds there what took most of its time, one case after the other.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from .cases import quick_cases
from .contenders import CONTENDERS, PRESETS, Case, absent, need
from .measure import differentiable, one_line

AT_ONCE = max(1, (os.cpu_count() or 1) // 2)
NICE = 10  # the ladder, which runs beside this, comes first
FITS = 2**33  # bytes of a contender's matrices: several share the GPU


def step(name: str, case: Case) -> str:
    start = time.perf_counter()
    try:
        inputs = case.inputs()
        torch.autograd.grad(CONTENDERS[name].build(case)(*inputs), differentiable(inputs))
        result = "ran"
    except Exception as error:  # the suite will say it too
        result = one_line(error)
    return f"{name}, {case.loss} {case.rows} x {case.depth}, C = {case.prototypes}: {result}, {time.perf_counter() - start:.1f} s"


def main(device: str) -> None:
    names = PRESETS["gpu" if device == "cuda" else "cpu"]
    chosen = [(name, case) for case in quick_cases(device) for name in names if not absent(name, case) and need(name, case) < FITS]
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn"), os.nice, (NICE,)) as pool:
        for done in as_completed([pool.submit(step, *each) for each in chosen]):
            print(done.result(), flush=True)


if __name__ == "__main__":
    main("cuda" if torch.cuda.is_available() else "cpu")
