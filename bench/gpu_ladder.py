"""Correctness on a GPU in about a minute, kernel family by kernel family: ``python -m bench.gpu_ladder FILE``.

Each rung runs in a process of its own with a time limit, several at once: a kernel that hangs or crashes costs its own rung alone. The JSON
file is written anew after each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastsupcon import functional as F
from fastsupcon.backends import BACKENDS
from tests.contract import ALL, BF16, F16, F32, PSC, SCL, Case, check, check_bits, check_some, problem

from .gpu import PYTHON, Part, ended
from .report import write_whole

LIMIT = 40  # seconds for a rung, the import of torch included
AT_ONCE = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Rung:
    name: str
    backend: str
    cases: list[Case]
    check: Callable[..., None] = check
    family: str | None = None  # FASTSUPCON_CUDA


def rows(*shapes: tuple[int, int], dtype=BF16, scale=10.0, **options) -> list[Case]:
    return [Case(n, d=d, dtype=dtype, scale=scale, keys="few", **options) for n, d in shapes]


def cross(*shapes: tuple[int, int, int], dtype=BF16, whole=False, **options) -> list[Case]:
    """With the quantities of PSC, or all of both sides."""
    quantities = {"rows": ALL, "columns": ALL} if whole else {"rows": PSC}
    return [Case(n, m, d=d, dtype=dtype, scale=10.0, keys="few", **quantities, **options) for n, m, d in shapes]


def either(scale=10.0, **options) -> list[Case]:
    """Only the device knows whether these sums are bounded: both families are launched. The last as CLIP's, of both sides."""
    shapes = rows((300, 64), (1000, 128), (300, 256), (300, 512), (300, 768), scale=scale, **options)
    clip = {"rows": SCL, "columns": SCL, "keys": "few", "dtype": BF16, "scale": scale}
    return [*shapes, Case(300, 300, d=128, **clip, **options), Case(300, 200, d=384, **clip, **options)]


def in_a_graph(backend, case: Case, device: torch.device) -> None:
    """The whole loss, captured at its first launch and replayed on other rows."""
    pairs = problem(case, device)
    z = pairs.rows.requires_grad_()
    name = next(name for name, module in BACKENDS.items() if module is backend)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = F.supcon_loss(z, pairs.row_keys, temperature=0.1, normalize=True, backend=name)
        return loss, torch.autograd.grad(loss, z)[0]

    if name == "triton":  # its first call compiles
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
    graph.replay()
    torch.cuda.synchronize()
    for mine, expected in zip(captured, step(), strict=True):
        assert torch.equal(mine, expected), f"off by {(mine - expected).abs().max():.2e}"


RUNGS = [
    Rung("wgmma forward and backward", "cuda", rows((300, 64), (300, 128), (300, 256), (5000, 128)), family="wgmma"),
    Rung("wgmma boxes outside", "cuda", rows((3, 8), (65, 104), (129, 136), (1000, 192), (257, 72)), family="wgmma"),
    Rung("wgmma cross", "cuda", cross((70, 150, 64), (200, 5000, 128), (129, 300, 200)), family="wgmma"),
    Rung("wgmma cross, both sides", "cuda", cross((300, 70, 128), (130, 400, 256), whole=True), family="wgmma"),
    Rung("wgmma f16", "cuda", rows((300, 64), (300, 128), (129, 136), (300, 256), (300, 512), (90, 768), dtype=F16), family="wgmma"),
    Rung("deep, 5 to 8 panels", "cuda", rows((70, 264), (300, 320), (300, 512)) + cross((70, 150, 320)), family="wgmma"),
    Rung("deep, 9 to 12 panels", "cuda", rows((64, 520), (300, 768)) + cross((70, 150, 640)), family="wgmma"),
    Rung("deep, 13 to 16 panels", "cuda", rows((90, 776), (300, 1024), (33, 1016)) + cross((70, 150, 1000)), family="wgmma"),
    Rung("deep, each pair once", "cuda", rows((8192, 320), (5000, 512), (8191, 768), (8192, 1000)), check_some),
    Rung("learned scale, bounded", "cuda", either(learned=True)),
    Rung("learned scale, running", "cuda", either(learned=True, scale=1000.0)),
    Rung("rows as they are, bounded", "cuda", either(unit=False, scale=6.0)),
    Rung("rows as they are, one long", "cuda", either(unit=False, scale=6.0, long_row=1000.0)),
    Rung("learned scale, same bits", "cuda", rows((5000, 128), (700, 512), learned=True), check_bits),
    Rung("mma bf16", "cuda", rows((65, 100), (513, 129), (300, 128), (200, 1100)), family="mma"),
    Rung("mma bf16 cross", "cuda", cross((70, 150, 100), (300, 3000, 128), whole=True, bias=True, own=True), family="mma"),
    Rung("mma bf16, running sums", "cuda", rows((300, 128), (2000, 64), scale=1000.0) + rows((300, 128), learned=True), family="mma"),
    Rung("mma f32", "cuda", rows((65, 40), (130, 128), (300, 320), dtype=F32) + cross((200, 5000, 128), dtype=F32, own=True), family="mma"),
    Rung("far keys", "cuda", [Case(300, d=d, dtype=BF16, scale=10.0, keys="int64", rows=ALL) for d in (128, 320, 768)], family="wgmma"),
    Rung("triton rows alone", "triton", [Case(300, d=128, dtype=BF16, scale=0.1, unit=False, rows=("all",))]),
    Rung("triton bf16", "triton", rows((300, 128), (5000, 128), (300, 256)) + cross((200, 5000, 128))),
    Rung("triton bf16 deep", "triton", rows((300, 512), (200, 768)) + cross((70, 150, 320), whole=True, bias=True, own=True)),
    Rung("triton f32", "triton", rows((300, 128), dtype=F32) + cross((70, 150, 128), dtype=F32, own=True)),
    Rung("cuda same bits", "cuda", rows((5000, 128), (700, 64), (400, 512), (2000, 1024)), check_bits),
    Rung("cuda large", "cuda", rows((20000, 128), (65536, 128), (65536, 512)), check_some),
    Rung("triton large", "triton", rows((20000, 128), (65536, 128)), check_some),
    Rung("cuda loss in a graph", "cuda", rows((1000, 128), (3000, 300)), in_a_graph),
    Rung("triton loss in a graph", "triton", rows((1000, 128)), in_a_graph),
]


def climb(rung: Rung) -> None:
    """Prints "ok" or "BAD" and why, a line a case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in rung.cases:
        start = time.perf_counter()
        try:
            if reason := BACKENDS[rung.backend].unusable(device, case.dtype, case.d):
                raise RuntimeError(reason)
            rung.check(BACKENDS[rung.backend], case, device)
            result = "ok"
        except Exception as error:
            result = f"BAD {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{result} [{case}, {time.perf_counter() - start:.1f} s]", flush=True)
        if "CUDA error" in result or "cudaError" in result:
            return  # the context is lost


def main(out: Path) -> int:
    results: dict[str, dict] = {}
    parts = [
        Part(str(i), LIMIT, [PYTHON, "-m", "bench.gpu_ladder", str(i)], {"FASTSUPCON_CUDA": rung.family} if rung.family else {})
        for i, rung in enumerate(RUNGS)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for part, end, _, text in ended([parts[i : i + AT_ONCE] for i in range(0, len(parts), AT_ONCE)], Path(scratch)):
            rung, lines = RUNGS[int(part.name)], text.decode(errors="replace").splitlines()
            good, bad = ([line for line in lines if line.startswith(word)] for word in ("ok ", "BAD "))
            passed = end == "passed" and len(good) == len(rung.cases)
            results[rung.name] = {"passed": passed, "end": end, "ok": good, "bad": bad, "log": [] if passed or bad else lines[-12:]}
            ending = "" if end == "passed" else f", {end}"  # its process ended well, be its cases as they may
            print(f"{'ok ' if passed else 'BAD'} {rung.name}: {len(good)} of {len(rung.cases)} cases{ending}", flush=True)
            for line in [*bad, *results[rung.name]["log"]]:
                print(f"      {line[:240]}", flush=True)
            write_whole(out, json.dumps(results, indent=1).encode())
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        climb(RUNGS[int(sys.argv[1])])
    else:
        sys.exit(main(Path(sys.argv[1])))
