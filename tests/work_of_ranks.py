"""What the ranks of tests/processes.py do: each function gets the process group first. Tensors come and go as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.table import LOSSES

#: How many samples each rank has, by the number of ranks: uneven, and one without any.
SHARES = {1: [13], 2: [10, 3], 3: [6, 1, 6], 4: [5, 0, 2, 6]}
SAMPLES, DEPTH = 13, 6


def whole(name: str, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The inputs of a row of the table for all ranks' samples, the same in every process."""
    torch.manual_seed(1)
    return LOSSES[name].on(SAMPLES, DEPTH, torch.device("cpu"), dtype)


def part_of(name: str, inputs: tuple[Tensor | None, ...], rank: int, size: int) -> tuple[Tensor | None, ...]:
    """This rank's: prototypes are everybody's, and of what there is more than samples the last rank has the rest."""
    parts: list[Tensor | None] = []
    for number, x in enumerate(inputs):
        if x is None or (LOSSES[name].has_prototypes and number == 2):
            parts.append(None if x is None else x.detach().requires_grad_(x.requires_grad))
            continue
        first, last = (sum(SHARES[size][:r]) for r in (rank, rank + 1))
        parts.append(x.detach()[first : len(x) if rank == size - 1 else last].requires_grad_(x.requires_grad))
    return tuple(parts)


def step(group: dist.ProcessGroup, name: str, dtype: torch.dtype, across: str, options: dict[str, Any]) -> dict[str, Any]:
    """The loss of all ranks' rows, and of this rank's inputs the gradients that an average over ranks is made of."""
    row, rank, size = LOSSES[name], dist.get_rank(group), dist.get_world_size(group)
    inputs = part_of(name, whole(name, dtype), rank, size)
    loss = row.ours(*inputs, **row.options | options, group=group, across=across, backend="cpu")
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    grads = torch.autograd.grad(loss.sum() if loss.ndim else loss, leaves)
    scale = 1 if loss.ndim else size
    return {
        "loss": loss.detach().numpy(),
        "grads": [(grad / scale).float().numpy() if dtype == torch.bfloat16 else (grad / scale).numpy() for grad in grads],
    }


def same_bits(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return np.array_equal(first["loss"], second["loss"]) and all(map(np.array_equal, first["grads"], second["grads"]))
