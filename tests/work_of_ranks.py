"""What the ranks of tests/processes.py do: each function gets the process group first. Tensors come and go as NumPy arrays."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a default group: its functions keep for theirs the one that was when they were imported
from torch import Tensor

from fastsupcon import SupConLoss, grad_cache
from fastsupcon import functional as F
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


def of_libraries(group: dist.ProcessGroup, function: str, *arguments: Any) -> Any:
    """A function of work_of_libraries.py, which imports other libraries, with this group for the default one."""
    from torch.distributed import distributed_c10d

    from tests import work_of_libraries

    everybody = dist.group.WORLD
    distributed_c10d._update_default_pg(group)
    try:
        return getattr(work_of_libraries, function)(*arguments)
    finally:
        distributed_c10d._update_default_pg(everybody)


def rows_of_rank(group: dist.ProcessGroup, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, int, int]:
    """All ranks' rows, this rank's as a leaf, and its rank and the number of ranks."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(2)
    everything = torch.randn(sum(SHARES[size]), *shape, dtype=dtype)
    return everything, mine(everything, rank, size).detach().requires_grad_(), rank, size


def mine(x: Tensor, rank: int, size: int) -> Tensor:
    return x.split(SHARES[size])[rank]


def twice_the_same_bits(group: dist.ProcessGroup, name: str, across: str) -> bool:
    return same_bits(*(step(group, name, torch.float32, across, {}) for _ in range(2)))


def learned_temperature(group: dist.ProcessGroup, across: str) -> tuple[float, float]:
    """This rank's gradient of the temperature and the one that one process would have."""
    everything, rows, rank, size = rows_of_rank(group, 2, DEPTH)
    labels = torch.arange(len(everything)) % 4
    gradients = []
    for z, y, options in ((everything, labels, {}), (rows, mine(labels, rank, size), {"group": group, "across": across})):
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = F.supcon_loss(z, y, temperature=temperature, base_temperature=0.1, normalize=True, **options)
        gradients.append(torch.autograd.grad(loss, temperature)[0].item())
    return gradients[1], gradients[0]


def supcon(group: dist.ProcessGroup, across: str, given: tuple[str, ...], options: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """Loss and gradient of this rank's rows with what is ``given``, and what one process has of them."""
    everything, rows, rank, size = rows_of_rank(group, 2, DEPTH)
    labels, count = torch.tensor([0, 1, 2, 2, 3, 3, 3, 0, 4, 5, 3, 3, 6]), len(everything)
    of_all: dict[str, Any] = {}
    if "anchor_weights" in given:
        of_all["anchor_weights"] = torch.rand(count, dtype=torch.float64)
    if "keys" in given:
        of_all["keys"], of_all["key_labels"] = torch.randn(count, DEPTH, dtype=torch.float64), labels.flip(0)
        everything, rows = everything[:, 0].detach(), rows[:, 0].detach().requires_grad_()
    of_rank = {name: mine(x, rank, size) for name, x in of_all.items()}
    if "class_weights" in given:
        of_all["class_weights"] = of_rank["class_weights"] = torch.linspace(0.1, 2, 7, dtype=torch.float64)
    everything.requires_grad_()
    options = {"temperature": 0.2, "normalize": True} | options
    want = F.supcon_loss(everything, labels, **of_all, **options)
    got = F.supcon_loss(rows, mine(labels, rank, size), **of_rank, **options, group=group, across=across)
    of_all_grad, of_rank_grad = torch.autograd.grad(want.sum(), everything)[0], torch.autograd.grad(got.sum(), rows)[0]
    if options.get("reduction") == "none":  # rows go view-major
        want = mine(want.detach().view(-1, count).T, rank, size).T.flatten()
    else:
        of_rank_grad = of_rank_grad / size
    return tuple(x.detach().numpy() for x in (got, want, of_rank_grad, mine(of_all_grad, rank, size)))


def with_queue(group: dist.ProcessGroup, across: str) -> list[tuple[float, float]]:
    """Losses of three steps, and of one process's."""
    from fastsupcon import InfoNCELoss, MemoryQueue, NTXentLoss, SupConLoss

    found = []
    everything, _, rank, size = rows_of_rank(group, 3, DEPTH)
    labels = torch.arange(len(everything)) % 4
    for kind, options in ((SupConLoss, {}), (InfoNCELoss, {"symmetric": False}), (NTXentLoss, {})):
        ours, whole_loss = (
            kind(temperature=0.2, normalize=True, queue=MemoryQueue(3 * len(everything), DEPTH, dtype=torch.float64), **options, **more)
            for more in ({"group": group, "across": across}, {})
        )
        for number in range(3):
            rows, other = everything[:, number], everything[:, (number + 1) % 3]
            of_all = (rows, labels) if kind is SupConLoss else (rows, other)
            found.append((ours(*(mine(x, rank, size) for x in of_all)).item(), whole_loss(*of_all).item()))
    return found


def grad_cached(group: dist.ProcessGroup) -> dict[str, Any]:
    from tests.test_grad_cache import of_rank

    return of_rank(dist.get_rank(group), group)


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def trained(group: dist.ProcessGroup, how: str, across: str) -> dict[str, float]:
    """Largest relative difference of a network's gradients from one process's, after one step of a loss that is taken over all ranks."""
    from fastsupcon import PSCLoss, SupConLoss

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(3)
    network, samples = Network(), torch.randn(sum(SHARES[size]), 8)
    labels = torch.arange(len(samples)) % 5
    found = {}
    for name in ("scl", "psc"):
        torch.manual_seed(4)
        kind, arguments = (SupConLoss, ()) if name == "scl" else (PSCLoss, (5, DEPTH))
        over = {"group": group, "across": across}
        losses = [kind(*arguments, temperature=0.2, normalize=True, **more) for more in ({}, over)]
        losses[1].load_state_dict(losses[0].state_dict())
        models = [torch.nn.ModuleList([copy.deepcopy(network), loss]) for loss in losses]
        of_one = models[0]
        of_one[1](of_one[0](samples), labels).backward()
        both = Both(*models[1])
        if how == "ddp":
            wrapped: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(both, process_group=group)
        elif how == "fsdp2":
            from torch.distributed.device_mesh import DeviceMesh
            from torch.distributed.fsdp import fully_shard

            mesh = DeviceMesh.from_group(group, "cpu")
            fully_shard(both.network, mesh=mesh)
            wrapped = both
        elif how == "grad_cache":
            encoder = torch.nn.parallel.DistributedDataParallel(both.network, process_group=group)
            wrapped = Both(functools.partial(grad_cache, encoder, chunk=2), both.loss)
        elif how == "compile":
            wrapped = torch.nn.parallel.DistributedDataParallel(both, process_group=group)
            wrapped = torch.compile(wrapped, backend="aot_eager")
        else:
            wrapped = torch.nn.parallel.DistributedDataParallel(both, process_group=group)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = wrapped(mine(samples, rank, size), mine(labels, rank, size))
        loss.backward()
        if how in ("fsdp2", "grad_cache") and name == "psc":  # the loss stands outside of what is wrapped
            torch.distributed.all_reduce(both.loss.prototypes.grad.div_(size), group=group)
        difference = 0.0
        for one, other in zip(of_one.parameters(), both.parameters(), strict=True):
            grad = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
            difference = max(difference, ((grad - one.grad).abs().max() / one.grad.abs().max()).item())
        found[name] = difference
    return found


class Both(torch.nn.Module):
    def __init__(self, network: Callable[[Tensor], Tensor], loss: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.network(x), labels)


def disagreeing(group: dist.ProcessGroup, what: str) -> str:
    """What is raised where the last rank differs in one thing."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    odd = rank == size - 1
    options: dict[str, Any] = {"temperature": 0.2, "normalize": True, "group": group}
    depth, dtype = 6, torch.float32
    if odd:
        depth = 7 if what == "depth" else depth
        dtype = torch.float64 if what == "dtype" else dtype
        options |= {"temperature": 0.3} if what == "temperature" else {}
        options |= {"reduction": "sum"} if what == "reduction" else {}
        options |= {"across": "ring"} if what == "across" else {}
    z = torch.randn(4, depth, dtype=dtype)
    if what == "loss" and odd:
        F.nt_xent_loss(z, z, temperature=0.2, group=group)
    else:
        F.supcon_loss(z, torch.arange(4) % 2, **options)
    return ""


def late(group: dist.ProcessGroup) -> float:
    """The loss, which the last rank never calls."""
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        return 0.0
    return F.supcon_loss(torch.randn(4, 6), torch.arange(4) % 2, normalize=True, group=group).item()


def with_nan(group: dist.ProcessGroup) -> float:
    z = torch.randn(4, 6)
    if dist.get_rank(group) == 0:
        z[1, 2] = torch.nan
    return F.supcon_loss(z, torch.arange(4) % 2, normalize=True, group=group).item()


def lone(group: dist.ProcessGroup) -> None:
    """Every second rank has an anchor whose label nobody shares."""
    labels = torch.tensor([0, 0, 100 + dist.get_rank(group)]) if dist.get_rank(group) % 2 else torch.zeros(3, dtype=torch.int64)
    F.supcon_loss(torch.randn(3, 6), labels, lone_anchors="error", group=group)


def refused(group: dist.ProcessGroup) -> list[str]:
    found = []
    z, labels = torch.randn(4, 6, requires_grad=True), torch.arange(4) % 2
    calls = [
        lambda: F.supcon_loss(z, mask=torch.ones(4, 4), group=group),
        lambda: F.supcon_loss(z, positives=torch.zeros(4, 1, dtype=torch.int64), group=group),
        lambda: F.supcon_loss(z, labels, across="ring"),
        lambda: F.supcon_loss(z, labels, group=group, across="star"),
        lambda: F.supcon_loss(z, labels, group=3),
        lambda: F.supcon_loss(z[:0], labels[:0], group=group),
        lambda: torch.autograd.grad(F.supcon_loss(z, labels, group=group), z, create_graph=True),
        lambda: pickle.dumps(SupConLoss(group=group)),
    ]
    for call in calls:
        try:
            call()
            found.append("nothing")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found
