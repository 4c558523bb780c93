"""What the presets of ``python -m bench`` measure, what matters most first."""

from __future__ import annotations

import os
from dataclasses import replace

from .contenders import CONTENDERS, LOSSES, Case

SMALL = (256, 512, 1024, 2048)  # what people train with: N x 128,
PROTOTYPES = (10, 100, 1000)  # PSC with N = 1,024,
WIDE = ((256, 384), (256, 768), (1024, 384), (1024, 768), (2048, 768), (4096, 768))  # and what encoders without a head give


def cores() -> int:
    """That this process may use: taskset and containers give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_cases(all_cores: int) -> list[Case]:
    cases = [Case("scl", rows, 128) for rows in SMALL] + [Case("psc", 1024, 128, prototypes) for prototypes in PROTOTYPES]
    cases += [Case("self", *shape) for shape in WIDE] + [Case("cross", *shape, shape[0]) for shape in WIDE]
    cases += [Case("psc all", 1024, 128, 1000), Case("psc all", 2048, 128, 2048)]  # the second is one direction of CLIP
    cases += [Case("scl", rows, 128) for rows in (4096, 8192)] + [Case("psc", 1024, 128, 100_000)]
    if all_cores > 1:
        cases += [replace(case, threads=all_cores) for case in cases]
    cases += [Case("scl", 4096, 512), Case("scl", 16384, 128), Case("scl", 131072, 128, threads=all_cores, only=("cpu",))]
    cases += [Case("scl", rows, 128, dtype="bfloat16") for rows in (1024, 4096, 8192)]
    timed = {case.loss for case in cases}
    return cases + [Case(loss, 1536, 128, 300 if row.has_prototypes else 0) for loss, row in LOSSES.items() if loss not in timed]


def gpu_cases() -> list[Case]:
    def case(*shape, **options) -> Case:
        return Case(*shape, device="cuda", **options)

    # what matters most comes first: where device time is short, a run cut off keeps whole cases
    large = [case("scl", *shape, dtype="bfloat16") for shape in ((65536, 128), (8192, 128), (65536, 512), (65536, 768))]
    small = [case("scl", rows, 128, dtype="bfloat16") for rows in reversed(SMALL)]
    small += [case("psc", 1024, 128, prototypes, dtype="bfloat16") for prototypes in PROTOTYPES]
    million = [case("scl", 1_048_576, 128, dtype="bfloat16", only=("cuda", "triton"))]
    fp32 = [case("scl", rows, 128) for rows in (65536, 8192, 1024)]
    psc = [case(loss, 8192, 128, 100_000, dtype="bfloat16") for loss in ("psc", "psc all")]
    psc += [case("psc", 8192, 128, prototypes, dtype="bfloat16") for prototypes in (10, 1000, 1_000_000)]
    wide = [case(*shape, dtype="bfloat16") for rows in (1024, 4096) for shape in (("self", rows, 768), ("cross", rows, 768, rows))]
    more = [case("clip", 65536, 384, 65536, dtype="bfloat16"), case("scl", 16384, 128, dtype="bfloat16")]
    return large + small + million + fp32 + psc + wide + more


def quick_cases(device: str) -> list[Case]:
    """Small ones on a CPU, those that matter most on a GPU."""
    if device == "cpu":
        cases = [Case("scl", 256, 128), Case("psc", 1024, 128, 10), Case("scl", 1024, 128, threads=cores())]
        return [replace(case, only=("naive", "torch.compile", "chunked", "cpu")) for case in cases]
    cases = [("scl", 1024, 128), ("scl", 8192, 128), ("scl", 65536, 128), ("psc", 1024, 128, 10), ("scl", 256, 128), ("scl", 2048, 128)]
    cases += [("scl", 65536, 512), ("clip", 65536, 384, 65536), ("psc", 1024, 128, 1000), ("scl", 4096, 128), ("scl", 512, 128)]
    cases += [("psc", 1024, 128, 100_000)]
    fast = tuple(name for name in CONTENDERS if name != "chunked")  # which takes seconds a step at the largest
    return [Case(*case, dtype="bfloat16", device="cuda", only=fast if case[1] == 65536 else ()) for case in cases]
