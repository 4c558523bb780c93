"""What ranks do with the losses of other libraries and with ours in their place. The default group is the one that they are called for.

Each function gives the value on this rank, and of the gradients of this rank's inputs what an average over ranks is made of.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.published import alone

DEPTH = 5
Told = tuple[np.ndarray, list[np.ndarray]]


def rows(samples: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of unit length, the same in every process."""
    x = torch.randn(samples, DEPTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_()


def classes(samples: int, number: int = 4, seed: int = 9) -> Tensor:
    return torch.randint(0, number, (samples,), generator=torch.Generator().manual_seed(seed))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def own(x: Tensor, counts: Sequence[int]) -> Tensor:
    """This rank's part of the rows of all."""
    part = x.detach().split(list(counts))[dist.get_rank()].clone()
    return part.requires_grad_(x.requires_grad)


def told(value: Tensor, leaves: Sequence[Tensor]) -> Told:
    grads = torch.autograd.grad(value, leaves)
    return value.detach().numpy(), [(grad / dist.get_world_size()).numpy() for grad in grads]


def clip(whose: str, counts: Sequence[int], local_loss: bool, gather_with_grad: bool) -> Told:
    if whose == "ours":
        from fastsupcon.integrations.open_clip import ClipLoss as kind
    else:
        kind = alone("open_clip.loss").ClipLoss
    image, text, scale = own(rows(sum(counts), 1), counts), own(rows(sum(counts), 2), counts), number(10.0)
    loss = kind(local_loss, gather_with_grad, True, dist.get_rank(), dist.get_world_size())
    loss(image, text, scale)  # with labels that are then kept
    return told(loss(image, text, scale), [image, text, scale])


def clip_in_ddp(counts: Sequence[int], local_loss: bool) -> list[np.ndarray]:
    """The gradients of a tower's parameters and of the scale, as DistributedDataParallel leaves them."""
    from fastsupcon.integrations.open_clip import ClipLoss

    model = torch.nn.parallel.DistributedDataParallel(tower())
    loss = ClipLoss(local_loss, rank=dist.get_rank(), world_size=dist.get_world_size())
    loss(*model(own(rows(sum(counts), 1), counts), own(rows(sum(counts), 2), counts))).backward()
    return [parameter.grad.numpy() for parameter in model.parameters()]


class tower(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(DEPTH, 4, dtype=torch.float64)
        self.scale = torch.nn.Parameter(number(7.0).detach())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(image), self.linear(text), self.scale


def wrong_clip(rank: int, world_size: int) -> None:
    from fastsupcon.integrations.open_clip import ClipLoss

    ClipLoss(rank=rank, world_size=world_size)(rows(3, 1), rows(3, 2), 1.0)


def lightly_ntxent(whose: str, counts: Sequence[int], bank: int, steps: int) -> list[Told]:
    """Of each step; with a bank of float64 rows."""
    if whose == "ours":
        from fastsupcon.integrations.lightly import NTXentLoss as kind
    else:
        module = alone("lightly.loss.ntx_ent_loss", "lightly.models.utils")
        module.MemoryBankModule.forward.__globals__["utils"].concat_all_gather = _concat_all_gather
        kind = module.NTXentLoss
    torch.manual_seed(4)
    loss = kind(0.2, (bank, DEPTH) if bank else 0, gather_distributed=True).double()
    if whose == "theirs" and bank:  # which ours brings to unit length again as it is used, in float64 too
        loss.memory_bank.bank = torch.nn.functional.normalize(loss.memory_bank.bank, dim=1)
    results = []
    for step in range(steps):
        views = [own(rows(sum(counts), seed), counts) for seed in (2 * step, 2 * step + 1)]
        results.append(told(loss(*views), views))
    return results


def _concat_all_gather(x: Tensor) -> Tensor:
    """lightly's of this name stands in a module that imports torchvision."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def lightly_supcon(counts: Sequence[int]) -> Told:
    from fastsupcon.integrations.lightly import SupConLoss

    views = [own(rows(sum(counts), seed), counts) for seed in (1, 2)]
    return told(SupConLoss(0.2, gather_distributed=True)(*views, own(classes(sum(counts)), counts)), views)


def ranking(whose: str, counts: Sequence[int], columns: int, options: dict[str, Any], cached: bool) -> Told:
    if whose == "ours":
        from fastsupcon.integrations import sentence_transformers as library
    else:
        from sentence_transformers.sentence_transformer import losses as library
    kind = library.CachedMultipleNegativesRankingLoss if cached else library.MultipleNegativesRankingLoss
    loss = kind([None], gather_across_devices=True, **options)  # a model of one module, which is not called
    texts = [own(rows(sum(counts), seed), counts) for seed in range(columns)]
    if not cached:
        return told(loss.compute_loss_from_embeddings(texts, None), texts)
    batches = [[part.detach().requires_grad_() for part in x.split(2)] for x in texts]
    loss.mini_batch_size = 2
    value = loss.calculate_loss(batches, with_backward=True)
    return value.numpy(), [torch.cat([part.grad for part in parts]).numpy() / dist.get_world_size() for parts in batches]


def sentence_supcon(counts: Sequence[int], cached: bool) -> Told:
    from fastsupcon.integrations import sentence_transformers as ours

    loss = (ours.CachedSupConLoss if cached else ours.SupConLoss)([None], 0.2, gather_across_devices=True)
    x, labels = own(rows(sum(counts), 1), counts), own(classes(sum(counts)), counts)
    if not cached:
        return told(loss.compute_loss_from_embeddings([x], labels), [x])
    value = loss.calculate_loss([[x]], labels, with_backward=True)
    return value.numpy(), [x.grad.numpy() / dist.get_world_size()]


def wrapped(whose: str, counts: Sequence[int], efficient: bool, memory: int) -> list[Told]:
    """pytorch-metric-learning's DistributedLossWrapper, of two steps; around its memory where there is one."""
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    from fastsupcon.integrations import pytorch_metric_learning as ours

    library = ours if whose == "ours" else losses
    loss = library.SupConLoss(0.2)
    if memory:
        loss = library.CrossBatchMemory(loss, DEPTH, memory)
    loss = DistributedLossWrapper(loss, efficient)
    results = []
    for seed in (1, 2):
        x = own(rows(sum(counts), seed), counts)
        results.append(told(loss(x, own(classes(sum(counts), seed=seed), counts)), [x]))
    return results


def metric_learning(counts: Sequence[int], across: str, reducer: str, case: str) -> list[Told]:
    """Of two steps."""
    from pytorch_metric_learning import reducers

    from fastsupcon.integrations.pytorch_metric_learning import CrossBatchMemory, SupConLoss

    temperature = torch.nn.Parameter(number(0.2).detach())
    loss = SupConLoss(temperature, group=dist.group.WORLD, across=across, reducer=getattr(reducers, reducer)())
    assert copy.deepcopy(loss).group is loss.group
    memory = CrossBatchMemory(loss, DEPTH, 12) if case == "memory" else None
    results = []
    for seed in (1, 2):
        x, labels = own(rows(sum(counts), seed), counts), own(classes(sum(counts), seed=seed), counts)
        if case == "lone":
            labels = own(torch.arange(sum(counts)), counts)
        if memory is not None:
            results.append(told(memory(x, labels), [x, temperature]))
        elif case == "others":
            others, others_labels = own(rows(sum(counts), 5), counts), own(classes(sum(counts), seed=5), counts)
            results.append(told(loss(x, labels, ref_emb=others, ref_labels=others_labels), [x, others, temperature]))
        else:
            results.append(told(loss(x, labels) + 0 * temperature + 0 * x.sum(), [x, temperature]))
    return results


def metric_learning_refuses(case: str) -> None:
    from pytorch_metric_learning import losses, reducers
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    from fastsupcon.integrations.pytorch_metric_learning import CrossBatchMemory, SupConLoss

    x, labels = rows(6, 1), classes(6)
    if case == "reducer":
        reducer = reducers.MultipleReducers({"loss": reducers.ClassWeightedReducer(torch.ones(4))})
        SupConLoss(group=dist.group.WORLD, reducer=reducer)(x, labels)
    loss = SupConLoss(group=dist.group.WORLD)
    if case == "memory":
        losses.CrossBatchMemory(loss, DEPTH, 8)(x, labels)
    if case == "no rows":
        CrossBatchMemory(loss, DEPTH, 8)(x[:0], labels[:0])
    DistributedLossWrapper(loss, efficient=True)(x, labels)
