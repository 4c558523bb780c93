"""What a loss over several processes costs each of them: bytes and flops by count, memory by reading, seconds by named constants.

It is what fastsupcon/distributed.py does with N rows on R ranks that have n = N / R of them each; the tests hold bytes and flops to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Constant(float):
    """A number of the model with its unit and where it is from."""

    def __new__(cls, value: float, unit: str, source: str) -> Constant:
        self = super().__new__(cls, value)
        self.unit, self.source = unit, source
        return self


KERNELS = "bench/results/kernels/h100.json, 65,536 rows, all ordered pairs"
NCCL = "NCCL's own model of a ring, src/graph/tuning.cc"
FORWARD_128 = Constant(539e12, "flop/s", f"{KERNELS}: 2.04 ms (an H200: 2.06)")
BACKWARD_128 = Constant(569e12, "flop/s", f"{KERNELS}: 3.86 ms (3.88)")
FORWARD_768 = Constant(542e12, "flop/s", f"{KERNELS}: 12.2 ms (12.1)")
BACKWARD_768 = Constant(399e12, "flop/s", f"{KERNELS}: 33.1 ms (33.2)")
START = Constant(12e-6, "s", "a pass beside its flops: h100.json within 8 % from 2,048 × 128 on, 12 % at 4,096 × 768")
TILE = Constant(64, "rows", "a kernel's smallest block: fewer rows take as long (bench/NOTES-cuda.md)")
HOST_FORWARD = Constant(93e-6, "s", "a slow host's time for a block, eager: H200, SCL 1,024 × 128, d39b462; up to twice that at caa986d")
HOST_BACKWARD = Constant(294e-6, "s", "the same run: 387 µs without the forward's 93")
NODE = Constant(8, "GPUs", "DGX/HGX H100, H200")
NVLINK = Constant(450e9, "byte/s", "H100's and H200's data sheets: 900 GB/s in both directions")
NIC = Constant(50e9, "byte/s", "a 400 Gb/s InfiniBand adapter for each GPU: DGX H100's data sheet")
REACHED = Constant(0.84, "", "380 GB/s of NVLink's 450 from one GPU to another: NVIDIA/nccl#1264; taken for InfiniBand too")
BASE = Constant(8.4e-6, "s", f"a collective: {NCCL}, Simple")
HOP = Constant(3.4e-6, "s", "a hop by NVLink: the same")
NET = Constant(9.6e-6, "s", "a hop between nodes: the same")
BASE_LL = Constant(3.6e-6, "s", f"a collective: {NCCL}, LL")
HOP_LL = Constant(0.85e-6, "s", "a hop by NVLink: the same, 1.8 × 0.47 µs")
NET_LL = Constant(2.7e-6, "s", "a hop between nodes: the same")
SHARE_LL = Constant(1 / 4, "", "of the bandwidth: the same")
MEET = Constant(1e-6, "s", "of the host for each rank's message in Ranks.meet: measured with 1,024 messages (Zen 3, one thread)")
TCP = Constant(30e-6, "s", "a hop of gloo's all-gather, which goes R - 1 of them: assumed")
MESSAGE = Constant(1024, "byte", "fastsupcon/ranks.py")
KEY = Constant(8, "byte", "int64")
SUM = Constant(4, "byte", "float32")
FIELDS = Constant(44, "byte", "a row or column, for the kernels: bench/NOTES-cuda.md")
NAIVE_SCL = Constant(7, "N × N in bf16", "peak of the naive loss, bench/results/gpu-h200.md: 57,377 MiB at 65,536")
NAIVE_CLIP = Constant(4, "N × N in bf16", "the same: 32,817 MiB at 65,536")
USABLE = Constant(0.9, "", "of a GPU's memory; what the encoder holds is not in it")
CONSTANTS = {name: x for name, x in globals().items() if isinstance(x, Constant)}

RATES = {128: (FORWARD_128, BACKWARD_128), 768: (FORWARD_768, BACKWARD_768)}
MEMORIES = (16, 24, 40, 80, 141)  # 10^9 bytes
ACROSS = ("gather", "ring")
HALF = 2  # bytes of bfloat16


class Loss(NamedTuple):
    """How many quantities of its rows and of its columns a loss asks for; none of columns: the rows meet each other."""

    rows: int
    columns: int
    matrices: float


LOSSES = {"SCL": Loss(3, 0, NAIVE_SCL), "CLIP": Loss(2, 1, NAIVE_CLIP)}  # all, similarity, count; all, similarity of rows, all of columns


# ---- Counts, of a rank ------------------------------------------------------------------------------------------------------------------


def travels(loss: Loss, across: str, depth: int, size: int = HALF) -> dict[str, list[int]]:
    """Bytes of each tensor that a row sends to every other rank, pass by pass. With columns of its own a loss has a pass for them too."""
    rows, sides = [depth * size, KEY], [SUM * (loss.columns or loss.rows)] * 2  # a side: log-sums and their gradients
    passes = {"forward": rows, "backward": sides if across == "gather" else rows + sides}
    if loss.columns:
        passes |= {"exchange": [SUM * loss.columns], "columns": [*rows, *[SUM * loss.rows] * 2]}
    return {name: [int(x) for x in tensors] for name, tensors in passes.items()}


def sent(loss: Loss, across: str, n: int, ranks: int, depth: int, size: int = HALF) -> int:
    """Bytes that a rank sends in a step, and as many come in: each rank's rows go to R - 1 others, whoever carries them."""
    return (ranks - 1) * (n * sum(map(sum, travels(loss, across, depth, size).values())) + int(MESSAGE))


def flops(loss: Loss, n: int, columns: int, depth: int) -> dict[str, int]:
    """Of n rows over so many columns. The CUDA kernels' forward takes a pass for each side; a backward is logits anew and one product."""
    pairs = n * columns * depth
    return {"forward": 2 * (1 + bool(loss.columns)) * pairs, "backward": 4 * pairs} | ({"columns": 4 * pairs} if loss.columns else {})


def memory(loss: Loss, across: str, n: float, ranks: int, depth: int) -> float:
    """Bytes at the peak over the rows themselves: what came, what the kernels take, sums and gradients in float32, the gradient."""
    row, side, other = depth * HALF + KEY, 2 * SUM * (loss.columns or loss.rows), 2 * SUM * loss.rows * bool(loss.columns)
    own = n * (2 * SUM * depth + HALF * depth + KEY + FIELDS + 2 * SUM * (loss.rows + loss.columns))
    if across == "gather":  # columns stay from forward to backward; a side is copied once, quantity by quantity
        backward = n * ranks * (row + (2 * side if not other else side + row + 2 * other) + FIELDS)
        forward = n * ranks * (row + FIELDS)
    else:  # a block in use and one coming
        backward = n * (2 * (row + max(side, other)) + max(side, other) + FIELDS)
        forward = n * (2 * row + FIELDS)
    if other:  # the captions' sums and gradient; in the forward shares of all columns, in order, and those received
        own += n * SUM * depth
        forward += 3 * SUM * loss.columns * n * ranks
    return max(backward + own, forward)


# ---- Seconds ----------------------------------------------------------------------------------------------------------------------------


def bandwidth(ranks: int, gpus: float = 1) -> float:
    """Of so many GPUs of a node together: NVLink within one, their adapters between nodes."""
    return REACHED * (NVLINK if ranks <= NODE else min(NVLINK, gpus * NIC))


def gathering(each: float, ranks: int) -> float:
    """NCCL's ring over all GPUs, which leaves a node by all its adapters, by the better of two protocols."""
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / NODE)
    protocols = ((BASE, HOP, NET, 1), (BASE_LL, HOP_LL, NET_LL, SHARE_LL))
    rest = (ranks - 1) * each / bandwidth(ranks, NODE)
    return min(base + (ranks - nodes) * hop + (nodes - 1) * net + rest / share for base, hop, net, share in protocols)


def hop(each: float, ranks: int) -> float:
    """All pass on at a time; the slowest is who sends to another node, by one adapter."""
    return BASE + (HOP if ranks <= NODE else NET) + each / bandwidth(ranks)


def kernel(loss: Loss, name: str, n: int, columns: int, depth: int) -> float:
    return START + flops(loss, max(n, int(TILE)), columns, depth)[name] / RATES[depth][name != "forward"]


def computing(loss: Loss, name: str, n: int, columns: int, depth: int) -> float:
    """The GPU's time, or the host's where that is longer."""
    return max(HOST_FORWARD if name == "forward" else HOST_BACKWARD, kernel(loss, name, n, columns, depth))


def seconds(loss: Loss, across: str, n: int, ranks: int, depth: int) -> dict[str, float]:
    """Of a step, and of it what the GPU waits for others. ``meet`` is the host's, before any of it is queued."""
    total = waiting = 0.0
    for name, tensors in travels(loss, across, depth).items():
        if name == "exchange":
            took = hop((ranks - 1) * n * tensors[0], ranks) if ranks > 1 else 0.0
            total, waiting = total + took, waiting + took
        elif across == "gather":
            took = sum(gathering(n * x, ranks) for x in tensors)
            total, waiting = total + took + computing(loss, name, n, n * ranks, depth), waiting + took
        else:
            block = computing(loss, name, n, n, depth)
            late = (ranks - 1) * max(0.0, hop(n * sum(tensors), ranks) - block)
            total, waiting = total + ranks * block + late, waiting + late
    return {"step": total, "waiting": waiting, "meet": (ranks - 1) * (MEET + TCP)}


def least(holds: Callable[[int], bool], most: int = 2**34) -> int:
    """The smallest number up to ``most`` from which on it holds."""
    if not holds(most):
        raise ValueError(f"it does not hold at {most:,}")
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def hidden(loss: Loss, name: str, depth: int, ranks: int) -> int:
    """Rows of a rank from which on a kernel takes as long as the hop beside it; host time is left out."""
    each = sum(travels(loss, "ring", depth)[name])
    return least(lambda n: kernel(loss, name, n, n, depth) >= hop(n * each, ranks))


def fits(loss: Loss, across: str, ranks: int, depth: int, bytes_of_gpu: float) -> int:
    """The largest N: memory is proportional to it."""
    return int(USABLE * bytes_of_gpu / memory(loss, across, 1, ranks, depth) * ranks)


def fits_naive(loss: Loss, bytes_of_gpu: float) -> int:
    return math.isqrt(int(USABLE * bytes_of_gpu / (loss.matrices * HALF)))


def within(loss: Loss, ranks: int, depth: int, limit: float) -> int:
    """The largest N of which a step takes no longer, gathered."""
    return ranks * (least(lambda n: seconds(loss, "gather", n, ranks, depth)["step"] > limit) - 1)


def points() -> list[dict]:
    found = []
    for name, loss in LOSSES.items():
        for depth in RATES:
            for ranks in (1, 2, 8, 64, 1024):
                for n in (2**e // ranks for e in range(10, 25, 2)):
                    point = {
                        "loss": name,
                        "depth": depth,
                        "ranks": ranks,
                        "rows": n * ranks,
                        "flops": sum(flops(loss, n, n * ranks, depth).values()),
                    }
                    for across in ACROSS:
                        took = {key: float(f"{x:.4g}") for key, x in seconds(loss, across, n, ranks, depth).items()}
                        bytes_ = {"sent": sent(loss, across, n, ranks, depth), "memory": int(memory(loss, across, n, ranks, depth))}
                        point[across] = bytes_ | took
                    found.append(point)
    return found
