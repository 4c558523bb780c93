"""Losses whose prototypes are shared out among the ranks of tests/processes.py, beside what one process makes of all of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastsupcon import PrototypeCrossEntropyLoss, PSCLoss
from fastsupcon import functional as F
from tests.work_of_ranks import DEPTH, SAMPLES, SHARES

CLASSES = 7
OF_CLASSES = {1: [7], 2: [5, 2], 3: [3, 0, 4], 4: [2, 1, 0, 4]}
COUNTS = torch.tensor([5, 0, 40, 3, 17, 9, 1])
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "psc": (F.psc_loss, {}),
    "psc all": (F.psc_loss, {"denominator": "all", "normalize": False}),
    "mpsc": (F.psc_loss, {"prototypes_per_class": 3}),
    "mpsc all": (F.psc_loss, {"prototypes_per_class": 3, "denominator": "all", "reduction": "sum"}),
    "cross-entropy": (F.prototype_cross_entropy, {}),
    "balanced": (F.prototype_cross_entropy, {"class_counts": COUNTS, "normalize": False}),
    "margins": (F.prototype_cross_entropy, {"class_counts": COUNTS, "margin": 0.2, "angular_margin": 0.3}),
    "ignored": (F.prototype_cross_entropy, {"ignore_index": -7}),
    "none": (F.prototype_cross_entropy, {"reduction": "none", "margin": 0.1}),
}
BUILD = {
    "psc": lambda **options: PSCLoss(CLASSES, DEPTH, prototypes_per_class=3, **options),
    "margins": lambda **options: PrototypeCrossEntropyLoss(CLASSES, DEPTH, COUNTS, 0.2, 0.3, temperature=0.1, **options),
}


def step(group: dist.ProcessGroup, case: str, across: str, dtype: torch.dtype) -> list[list[np.ndarray]]:
    """Loss and gradients of this rank's features and prototypes, and what they must be; the temperature's gradient ends both."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    function, options = CASES[case]
    per_class = options.get("prototypes_per_class", 1)
    torch.manual_seed(4)
    features, prototypes, upstream = torch.randn(SAMPLES, DEPTH), torch.randn(CLASSES * per_class, DEPTH), torch.rand(SAMPLES)
    labels = torch.randint(0, CLASSES, (SAMPLES,))
    if case == "ignored":
        labels[::4] = -7
    found = []
    for alone in False, True:
        rows, classes = ([SAMPLES], [CLASSES]) if alone else (SHARES[size], OF_CLASSES[size])
        number = 0 if alone else rank
        more = options | ({} if alone else {"group": group, "across": across, "sharded": True})
        if "class_counts" in more:
            more["class_counts"] = COUNTS.split(classes)[number]
        z, p = (
            x.split(s)[number].to(dtype, copy=True).requires_grad_()
            for x, s in ((features, rows), (prototypes, [c * per_class for c in classes]))
        )
        temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        loss = function(z, labels.split(rows)[number], p, temperature=temperature, **more, backend="cpu")
        weighted = loss @ upstream.split(rows)[number].to(dtype) if loss.ndim else loss
        of_z, of_p, of_temperature = torch.autograd.grad(weighted, (z, p, temperature))
        loss = loss.detach()
        if alone:  # this rank's part of it
            of_z, of_p = of_z.split(SHARES[size])[rank], of_p.split([c * per_class for c in OF_CLASSES[size]])[rank]
            loss = loss.split(SHARES[size])[rank] if loss.ndim else loss
        elif loss.ndim:  # an average over ranks of sums
            of_p = of_p * size
        else:
            of_z, of_temperature = of_z / size, of_temperature / size
        found.append([x.numpy() for x in (loss, of_z, of_p, of_temperature)])
    return found


def twice(group: dist.ProcessGroup, case: str, across: str) -> bool:
    """Whether two steps have the same bits."""
    first, second = (step(group, case, across, torch.float32)[0] for _ in range(2))
    return all(map(np.array_equal, first, second))


def module(group: dist.ProcessGroup, kind: str, across: str) -> dict[str, Any]:
    """What a module of shards does, beside one with all prototypes."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    build = BUILD[kind]
    torch.manual_seed(5)
    whole = build()
    after = torch.randn(2)
    torch.manual_seed(5)
    shards = build(group=group, across=across, sharded=True)
    found: dict[str, Any] = {"random state": torch.equal(after, torch.randn(2)), "own": list(shards.own)}
    state = shards.whole_state_dict()
    found["begins alike"] = (
        all(torch.equal(state[name], x) for name, x in whole.state_dict().items()) and state.keys() == whole.state_dict().keys()
    )

    features, labels = torch.randn(SAMPLES, DEPTH), torch.randint(0, CLASSES, (SAMPLES,))
    mine = [x.split(SHARES[size])[rank] for x in (features, labels)]
    optimisers = [torch.optim.SGD(x.parameters(), 0.5) for x in (whole, shards)]
    for _ in range(3):
        losses = []
        for loss, inputs, optimiser in zip((whole, shards), ((features, labels), mine), optimisers, strict=True):
            optimiser.zero_grad()
            losses.append(loss(*inputs))
            losses[-1].backward()
            optimiser.step()
    found["losses"] = [loss.item() for loss in losses]
    with torch.no_grad():
        found["logits"] = [x.numpy() for x in (shards.logits(mine[0]), whole.logits(features).split(SHARES[size])[rank])]

    state = shards.whole_state_dict()
    found["trained alike"] = [state["prototypes"].numpy(), whole.prototypes.detach().numpy()]
    one, again = build(), build(group=group, across=across, sharded=True)
    one.load_state_dict(state)
    again.load_state_dict(state)
    found["loads"] = torch.equal(one.prototypes, state["prototypes"]) and torch.equal(again.prototypes, shards.prototypes)
    again.load_state_dict(shards.state_dict())
    found["loads its own"] = torch.equal(again.prototypes, shards.prototypes)
    return found


def trained(group: dist.ProcessGroup, kind: str, how: str, across: str) -> float:
    """Largest relative difference from one process's of the gradients of a network under DistributedDataParallel, and of a shard."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(6)
    network, samples, labels = torch.nn.Linear(8, DEPTH), torch.randn(SAMPLES, 8), torch.randint(0, CLASSES, (SAMPLES,))
    whole, shards = BUILD[kind](), BUILD[kind](group=group, across=across, sharded=True)
    shards.load_state_dict(whole.state_dict())
    other = copy.deepcopy(network)
    model = torch.nn.parallel.DistributedDataParallel(other, process_group=group)
    loss: Any = torch.compile(shards, backend="aot_eager") if how == "compile" else shards
    z, y = (x.split(SHARES[size])[rank] for x in (samples, labels))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = loss(model(z), y)
    found.backward()
    whole(network(samples), labels).backward()
    rows = slice(shards.own.start * shards.per_class, shards.own.stop * shards.per_class)
    pairs = [(x.grad, y.grad) for x, y in zip(other.parameters(), network.parameters(), strict=True)]
    pairs.append((shards.prototypes.grad, whole.prototypes.grad[rows]))
    scales = [y.grad.abs().max() for y in (*network.parameters(), whole.prototypes)]
    return max(((x - y).abs().max() / scale).item() for (x, y), scale in zip(pairs, scales, strict=True) if len(x))


def copied(group: dist.ProcessGroup, how: str) -> None:
    """Calls a loss of even shards, of which all ranks have been given rank 0's."""
    loss = PSCLoss(2 * dist.get_world_size(group), DEPTH, group=group, sharded=True)
    called: Any = loss
    if how == "ddp":
        called = torch.nn.parallel.DistributedDataParallel(loss, process_group=group)
    else:
        loss(torch.randn(2, DEPTH), torch.arange(2))
        loss.load_state_dict({"prototypes": torch.ones(2, DEPTH)})
    called(torch.randn(2, DEPTH), torch.arange(2))


def refused(group: dist.ProcessGroup) -> list[str]:
    """What each of these says, on every rank."""
    rank = dist.get_rank(group)
    z, p, labels = torch.randn(3, DEPTH), torch.randn(2, DEPTH), torch.tensor([0, 1, 3])
    shards = {"group": group, "sharded": True}
    calls = [
        lambda: F.psc_loss(z, labels, p, sharded=True),
        lambda: F.psc_loss(z, labels, p, group=group, sharded=1),
        lambda: F.psc_loss(z, labels + 1, p, **shards),
        lambda: F.prototype_cross_entropy(z, labels + 1, p, **shards),
        lambda: F.psc_loss(z, labels, p[: 1 - rank], **shards),
        lambda: F.psc_loss(z, labels, p, group=group, sharded=rank == 0),
        lambda: F.prototype_cross_entropy(z, labels, p, class_counts=torch.zeros(2), **shards),
        lambda: F.prototype_cross_entropy(z, labels, p, class_counts=torch.ones(4), **shards),
        lambda: PSCLoss(4, DEPTH, **shards).logits(z),
        lambda: PSCLoss(4, DEPTH, sharded=True),
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("nothing")
        except (ValueError, TypeError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def with_nan(group: dist.ProcessGroup, across: str) -> float:
    """Rank 1 has a NaN among its prototypes."""
    p = torch.randn(3, DEPTH)
    if dist.get_rank(group) == 1:
        p[0, 0] = math.nan
    labels = torch.zeros(2, dtype=torch.int64)
    loss: Tensor = F.psc_loss(torch.randn(2, DEPTH), labels, p, group=group, across=across, sharded=True)
    return loss.item()
