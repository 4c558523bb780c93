"""The log-sum-exp of functional.py on the ranks of tests/processes.py, beside what one process makes of all ranks' rows and columns."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastsupcon import functional as F
from tests.work_of_ranks import DEPTH, SAMPLES, SHARES

COLUMNS = {1: [7], 2: [0, 7], 3: [3, 1, 3], 4: [2, 4, 0, 1]}


def logsumexp(group: dist.ProcessGroup, which: str, across: str, dtype: torch.dtype) -> list[list[np.ndarray]]:
    """Of this rank's: its values, then the gradients of rows, columns and biases; and what they must be. The scale's gradient ends both."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(3)
    a, b, bias, upstream = (torch.randn(*shape, dtype=dtype) for shape in ((SAMPLES, DEPTH), (7, DEPTH), (7,), (SAMPLES,)))
    of_rows, of_columns = torch.arange(SAMPLES) % 3, torch.arange(7) % 4
    skip = (torch.arange(SAMPLES) % 8) - 1
    found = []
    for alone in False, True:
        row_shares, column_shares, number = ([SAMPLES], [7], 0) if alone else (SHARES[size], COLUMNS[size], rank)

        def part(x: Tensor, shares: list[int], number: int = number) -> Tensor:
            return x.split(shares)[number].clone()

        options = {"scale": torch.tensor(0.7, dtype=dtype, requires_grad=True)} | ({} if alone else {"group": group, "across": across})
        z = part(a, row_shares).requires_grad_()
        leaves = [z]
        if which == "self":
            values = F.self_logsumexp(z, **options)
        else:
            leaves += [part(b, column_shares).requires_grad_(), part(bias, column_shares).requires_grad_()]
            if which == "labels":
                options |= {"row_labels": part(of_rows, row_shares), "column_labels": part(of_columns, column_shares)}
            elif which == "skip":
                options["skip"] = part(skip, row_shares)
            values = F.cross_logsumexp(z, leaves[1], bias=leaves[2], **options)
        grads = torch.autograd.grad(values @ part(upstream, row_shares), [*leaves, options["scale"]])
        everything = [values.detach(), *grads]
        if alone:
            shares = [SHARES[size], SHARES[size], COLUMNS[size], COLUMNS[size]][: len(everything) - 1]
            everything = [x.split(s)[rank] for x, s in zip(everything, shares, strict=False)] + everything[-1:]
        found.append([x.numpy() for x in everything])
    return found


def one_row(group: dist.ProcessGroup) -> tuple[np.ndarray, np.ndarray]:
    """Rank 1 has it."""
    z = torch.ones(int(dist.get_rank(group) == 1), DEPTH, requires_grad=True)
    values = F.self_logsumexp(z, group=group)
    return values.detach().numpy(), torch.autograd.grad(values.sum(), z)[0].numpy()


def refused(group: dist.ProcessGroup) -> list[str]:
    """A column beyond all ranks' three each, and a ring of this process alone."""
    z, said = torch.ones(3, DEPTH), []
    for options in {"skip": torch.full((3,), 6), "group": group}, {"across": "ring"}:
        try:
            F.cross_logsumexp(z, z, **options)
        except ValueError as error:
            said.append(f"ValueError: {error}")
    return said
