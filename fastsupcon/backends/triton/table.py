"""Tile sizes by kernel, GPU family, dtype and D. Those of half rows on Hopper are chosen by a sweep on an H200 (bf16, SCL, D 128 to 768);
of heavy gradients, of fp32 and of all other GPUs they are PREDICTED from registers, shared memory, instructions (bench/NOTES-triton.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    owned: int  # rows a program keeps
    streamed: int  # rows that pass at a time
    depth: int  # of D that a tile of rows holds: all of it where D <= depth, else read this much at a time
    warps: int
    stages: int  # tiles of the stream in flight, the one in use among them


def family(backend: str, arch: int | str) -> str:
    """The GPU family by Triton's target: backend "cuda" with 10 * major + minor, or "hip" with a gfx name."""
    if backend == "cuda" and isinstance(arch, int):
        if arch >= 120 or arch in (86, 89):
            return "small"  # tensor cores as sm_80's, 99 KiB of shared memory
        return "blackwell" if arch >= 100 else "hopper" if arch >= 90 else "ampere"  # 227, 227, 163 KiB
    return "amd" if backend == "hip" else "small"


def padded(depth: int) -> int:
    return max(16, 1 << (depth - 1).bit_length())


def tile(kernel: str, family: str, dtype: torch.dtype, depth: int) -> Tile:
    """The tile of "forward", "gradient" or "heavy gradient" for rows of this dtype and dimension.

    What makes a gradient heavy (a learned scale, a bias, own columns, log-sums of equal keys) leaves registers for half as many columns.
    Triton gives the logits of a gradient to the warps by 16 rows each: fewer owned rows than that, and warps compute the same twice.
    """
    d = padded(depth)
    gradient = kernel != "forward"
    heavy = kernel == "heavy gradient"
    if family == "interpreter":
        return Tile(256, 64, min(d, 256), 1, 1)  # its time goes by the number of operations, not by their size
    stages = 1 if family == "amd" else 2  # 64 KiB of shared memory on gfx942
    if dtype == torch.float32:  # three TF32 products a step: operands split in registers
        part = d if d <= 64 and gradient else min(d, 32)
        if family == "hopper":
            return Tile(128, 32, part, 8, 2) if gradient else Tile(128, 64 if d <= 64 else 128, part, 8, 3)
        return Tile(64, 32, part, 8, stages)
    if family == "hopper" and not gradient:
        return Tile(128, 64, d, 4, 3) if d <= 128 else Tile(128, 32, d, 8, 3) if d == 256 else Tile(128, 256, 64, 8, 3)
    if family == "hopper" and not heavy and d <= 256:
        # Two blocks to a multiprocessor: 2 % slower than 128 rows at 65,536 × 128, 8 % faster at 8,192 × 128.
        return Tile(64, 64, d, 4, 3) if d <= 128 else Tile(128, 64, d, 8, 2)
    if family in ("hopper", "blackwell"):  # Blackwell's forward: 128 owned rows, as 4 warps spill (on Hopper faster all the same)
        if gradient:
            held = d if d <= (512 if family == "hopper" else 256) else 64  # Triton asks for 6 KiB too many on Blackwell
            streamed = 32 if heavy or d > 128 else 64
            return Tile(128, 128 if d > 512 and not heavy else streamed, held, 8, 2 if held == 512 or (heavy and d == 256) else 3)
        return Tile(128, 64 if d <= 256 else 128, d if d <= 256 else 64, 8, 2 if d == 256 else 3)
    if d > 256:
        return Tile(64, 32, 64, 8, stages) if gradient or family == "amd" else Tile(64, 64, 64, 4, stages)
    if gradient:
        streamed = 16 if heavy or d == 256 or (family == "amd" and d > 64) else 64 if d <= 64 and family != "amd" else 32
        return Tile(64 if d == 256 else 128, streamed, d, 8, stages)
    return Tile(64, 64, d, 8 if family == "amd" else 4, stages)


def gradient_width(dtype: torch.dtype, depth: int, tile: Tile) -> int:
    """Columns of dx that one program owns, at most as many as its registers hold."""
    return min(padded(depth), 128 if dtype == torch.float32 and depth > tile.depth else 256)
