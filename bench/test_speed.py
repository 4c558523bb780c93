"""For regressions, with pytest-benchmark: ``pytest bench --benchmark-only``. ``python -m bench`` measures more."""

from __future__ import annotations

import pytest
import torch

from .contenders import CONTENDERS, Case, absent


@pytest.mark.parametrize("name", ["naive", "chunked", "cpu", "triton", "cuda"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("rows", [256, 512, 1024, 2048, 4096, 8192])
def test_scl(benchmark, rows, mode, name):
    case = Case("scl", rows, 128, threads=torch.get_num_threads(), device="cuda" if torch.cuda.is_available() else "cpu")
    if reason := absent(name, case):
        pytest.skip(reason)
    loss, inputs = CONTENDERS[name].build(case), case.inputs()

    def step() -> None:
        value = loss(*inputs)
        if mode == "forward+backward":
            torch.autograd.grad(value, inputs[0])
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{rows} x 128, {mode}"
    benchmark.pedantic(step, warmup_rounds=1, rounds=5)
