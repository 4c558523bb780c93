"""The model's parts timed on the processes at hand: whole steps of SCL, and alone its computing and each kind of communication.

Started by torchrun it takes those processes, by NCCL where each has a GPU; else it starts two of its own, by gloo, with a thread each.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsupcon.distributed import Shared
from fastsupcon.functional import supcon_loss
from fastsupcon.problem import Pairs
from fastsupcon.ranks import Ranks

from ..suite import processor, provenance, spread

TEMPERATURE, CLASSES = 0.1, 8
NAMES = ("all", "similarity", "count")


class Silent(Ranks):
    """The same calls, and nobody asked: in the place of others' rows come copies of this rank's own."""

    def gather(self, x: Tensor, kind: str) -> Tensor:
        return x.detach().repeat(self.size, *[1] * (x.ndim - 1))

    def _pass_on(self, here: Mapping[str, Tensor], coming: Mapping[str, Tensor]) -> list[Any]:
        for name, x in here.items():
            coming[name].copy_(x)
        return []


def measure(rows: tuple[int, ...], depth: int, rounds: int) -> list[dict] | None:
    """An entry for each N, on the first rank; None on the others."""
    if "RANK" in os.environ:
        gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        dist.init_process_group("nccl" if gpus else "gloo", timeout=datetime.timedelta(minutes=5))
        try:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
            if gpus:
                torch.cuda.set_device(device)
            found = [entry(n, depth, rounds, device) for n in rows]
            return found if dist.get_rank() == 0 else None
        finally:
            dist.destroy_process_group()
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    processes = [context.Process(target=_serve, args=(rank, port, rows, depth, rounds, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a measuring process failed; its traceback is above")
    return results.get()


def _serve(rank: int, port: int, rows: tuple[int, ...], depth: int, rounds: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    if found := measure(rows, depth, rounds):
        results.put(found)


def entry(n: int, depth: int, rounds: int, device: torch.device) -> dict:
    """Of N rows, bfloat16 on a GPU, float32 on a CPU: the slowest rank's seconds, in rounds that begin with another step each."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, depth, generator=generator).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    labels = torch.randint(CLASSES, (n,), generator=generator).to(device)
    mine, of_mine = (x.tensor_split(size)[rank].contiguous() for x in (z, labels))
    ways = {across: Ranks(dist.group.WORLD, across) for across in ("gather", "ring")}
    silent = {across: Silent(dist.group.WORLD, across) for across in ways}
    for ranks in (*ways.values(), *silent.values()):
        ranks.meet("bench", device, {"rows": len(mine)}, depth=depth)
    side = torch.zeros(len(mine), len(NAMES), device=device)
    payloads = {"rows": mine, "keys": of_mine}, {"values": side, "grads": side}
    ring = payloads[0], payloads[0] | payloads[1]

    def alone(threads: int) -> None:
        if rank == 0:
            torch.set_num_threads(threads)
            x = z.clone().requires_grad_()
            supcon_loss(x, labels, temperature=TEMPERATURE, normalize=True).backward()
            torch.set_num_threads(1)

    def step(ranks: Ranks) -> None:
        x = mine.clone().requires_grad_()
        shared = Shared(Pairs(x, None, 1 / TEMPERATURE, True, row_keys=of_mine), ranks, "rows", "rows")
        everything, similarity, count = shared.terms(NAMES)[0]
        ((everything - similarity / count.clamp_min(1)).sum() / n).backward()

    share = torch.zeros(n, 1, device=device)
    steps: dict[str, Callable[[], object]] = {
        "one process": lambda: alone(1),
        "one process, two threads": lambda: alone(2),
        **{across: lambda ranks=ranks: step(ranks) for across, ranks in ways.items()},
        **{f"{across}, silent": lambda ranks=ranks: step(ranks) for across, ranks in silent.items()},
        "meet": lambda: ways["gather"].meet("bench", device, {"rows": len(mine)}, depth=depth),
        "gathering": lambda: [list(ways["gather"].blocks(payload, "rows")) for payload in payloads],
        "passing on": lambda: [list(ways["ring"].blocks(payload, "rows")) for payload in ring],
        "exchange": lambda: ways["gather"].exchange(share, "rows"),
    }
    if device.type == "cuda":
        del steps["one process, two threads"]
    seconds = torch.zeros(len(steps), rounds + 2, dtype=torch.float64)
    for turn in range(rounds + 2):
        for i in range(len(steps)):
            which = (i + turn) % len(steps)
            if device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            begun = time.perf_counter()
            list(steps.values())[which]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[which, turn] = time.perf_counter() - begun
    seconds = seconds.to(device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    found = {name: spread(list(samples[2:])) for name, samples in zip(steps, seconds.tolist(), strict=True)}  # two rounds warm up
    where = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return {"rows": n, "depth": depth, "ranks": size, "backend": dist.get_backend(), "device": where, **provenance(), "seconds": found}
