"""Times the forward and the backward of SCL's terms on each fused backend by CUDA graph replay, against this GPU's matrix-product rate.

``python -m bench.gpu_kernels FILE [BACKEND ...]``: the JSON file is written anew after each shape of each backend.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastsupcon.backends import BACKENDS, reference
from fastsupcon.problem import Line, Pairs, Side

from .report import write_whole

SHAPES = [(65536, 128), (8192, 128), (2048, 128), (512, 128), (65536, 64), (65536, 256), (65536, 512), (65536, 768)]
LEAST = 1.0  # ms that one replay should take: shorter calls share a graph, so that its launch is none of their time


def milliseconds(call: Callable[[], object], calls: int = 1, replays: int = 7) -> list[float]:
    """Of one call each: [median, least, most] over the replays."""
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    if calls == 1 and min(times) < LEAST:
        return milliseconds(call, math.ceil(LEAST / min(times)), replays)
    return [statistics.median(times), min(times), max(times)]


def kernels(name: str, count: int, depth: int, rate: float) -> dict:
    """Milliseconds, and percent of the bf16 product's rate in TFLOP/s."""
    z = torch.randn(count, depth, device="cuda").bfloat16()
    pairs = Pairs(z, None, 10.0, True, None, torch.randint(0, 100, (count,), device="cuda"))
    backend, line = BACKENDS[name], Line(all=1, similarity=-1)
    if reason := backend.unusable(z.device, z.dtype, depth):
        return {"absent": reason}
    terms = backend.forward(pairs, line.names, (), False)
    grads = reference.line_backward(line.names, terms.rows, torch.ones((), device="cuda"), line)
    sides = Side(line.names, terms.rows, grads), Side((), terms.columns, terms.columns)
    forward = milliseconds(lambda: backend.forward(pairs, line.names, (), False))
    backward = milliseconds(lambda: backend.backward(pairs, *sides, terms.norms, terms.kept, (True, False, False, False)))
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_percent_of_2N2D": 100 * 2 * count**2 * depth / forward[0] / 1e9 / rate,
        "backward_percent_of_4N2D": 100 * 4 * count**2 * depth / backward[0] / 1e9 / rate,
    }


def main(out: Path, names: Sequence[str]) -> None:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / milliseconds(lambda: a @ b)[0] / 1e9  # TFLOP/s
    results = {"device": torch.cuda.get_device_name(), "bf16_product_tflops": rate, "kernels": []}
    for name in names or ("cuda", "triton"):
        for count, depth in SHAPES:
            try:
                found = kernels(name, count, depth, rate)
            except Exception as error:  # a kernel that fails is a result
                found = {"failed": f"{type(error).__name__}: {error}"}
            results["kernels"].append({"backend": name, "rows": count, "depth": depth, **found})
            print(results["kernels"][-1], flush=True)
            write_whole(out, json.dumps(results, indent=1).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
