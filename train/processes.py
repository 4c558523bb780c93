"""Training by several processes, which share out each batch and come to what one process would.

    torchrun --nproc-per-node 2 train/hybrid.py --method hybrid-psc        # a process a GPU, or as many on the CPU's cores

All of them draw the whole batch's indices and random numbers from the same seeds, and each keeps its part. Whatever is said of a batch, its
batch statistics and its losses, is of the whole one; gradients are averaged by DistributedDataParallel. Without torchrun there is one
process, and every function here gives back what it was given.

A network that draws random numbers itself, for dropout, draws other ones than in one process. All processes read the run's folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsupcon.ranks import Ranks

T = TypeVar("T")


def launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts(number: str) -> int:
    """How often torchrun has started this run again ("RESTART_COUNT"), or may ("MAX_RESTARTS")."""
    return int(os.environ.get(f"TORCHELASTIC_{number}", 0)) if launched() else 0


def device(name: str) -> torch.device:
    """Of this process: under torchrun the GPU of its LOCAL_RANK."""
    named = torch.device(name)
    if not launched() or named.type != "cuda":
        return named
    if named.index is not None:
        raise ValueError(f"device must be 'cuda' or 'cpu' under torchrun, which gives each process a GPU, got {name!r}")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextlib.contextmanager
def together(own: torch.device) -> Iterator[None]:
    """Under torchrun the processes meet at its start. What is raised within it leaves at once: others may never come to a parting."""
    if not launched():
        yield
        return
    if own.type == "cuda":
        torch.cuda.set_device(own)
    backends = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"  # what lies in the hosts' memory goes by gloo
    store, number, size = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # A restart finds the addresses of before in torchrun's store (PyTorch's issue 135712). Machines may count restarts differently.
        store = dist.PrefixStore(f"start {restarts('RESTART_COUNT')}", store)
    dist.init_process_group(backends, store=store, rank=number, world_size=size)
    yield
    dist.destroy_process_group()


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def part(total: int) -> range:
    """Which of ``total`` this process has: as many as each other one, or one more."""
    each, left = divmod(total, count())
    first = rank() * each + min(rank(), left)
    return range(first, first + each + (rank() < left))


# ---- what they tell each other


def told(value: T) -> T:
    """The first process's value. A question about files has one answer, though they are being written."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gathered(values: list[T]) -> list[T]:
    """Those of all processes, in their order."""
    if not dist.is_initialized():
        return values
    of_all: list[Any] = [None] * count()
    dist.all_gather_object(of_all, values)
    return [value for one in of_all for value in one]


def largest(number: int) -> int:
    """Through the hosts' memory: no GPU is waited for."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def total(x: Tensor) -> Tensor:
    """The sum over the processes, the same bits on each; differentiable."""
    everyone = group()
    return x if everyone is None else Ranks(everyone, "gather").sum(x)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_of_machine_first() -> Iterator[None]:
    """What the first process of a machine leaves on its disk, a download, the others find."""
    first = not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


# ---- gradients and batch statistics


class _Call(nn.Module):
    """A function as a module that has the parameters and no buffer, or their values would be sent at every call."""

    def __init__(self, function: Callable[..., Any], parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.function, self.parameters_used = function, nn.ParameterList(parameters)

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def averaging(function: Callable[..., Any], parameters: list[nn.Parameter]) -> Callable[..., Any]:
    """``function`` such that the parameters, of every one of which it makes its loss, have the mean of all processes' gradients.

    DistributedDataParallel, which stands around a module's call, sends them while the backward goes on.
    """
    return nn.parallel.DistributedDataParallel(_Call(function, parameters)) if dist.is_initialized() else function


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by the statistics of all processes' images, on CPUs, which torch.nn.SyncBatchNorm refuses.

    Of plain tensor operations: slower than the fused one, and more is held for the backward.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Channels second, whatever follows."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, self.weight.dtype))
        others, channels = [dim for dim in range(x.ndim) if dim != 1], (1, -1) + (1,) * (x.ndim - 2)
        wide = x.double()  # in which a variance may be taken as a difference
        here = torch.stack([wide.sum(others), wide.square().sum(others), wide.new_full(x.shape[1:2], x.numel() / x.shape[1])])
        sum_of_all, square_of_all, places = total(here)
        mean = sum_of_all / places
        variance = square_of_all / places - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((variance * places / (places - 1)).to(self.running_var.dtype), share)
        slope = self.weight * (variance + self.eps).rsqrt()
        mean, slope = (value.to(x.dtype).view(channels) for value in (mean, slope))
        return ((x - mean) * slope + self.bias.view(channels)).to(input.dtype)


def share_batch_statistics(network: nn.Module, own: torch.device) -> nn.Module:
    """Every batch normalisation of the network with the statistics of all processes' images."""
    if not dist.is_initialized():
        return network
    plain = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    layers = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        if type(layer) not in plain or not layer.track_running_stats or not layer.affine:
            raise ValueError(
                f"network must normalise by nn.BatchNorm with weights and running statistics for several processes to train it, got {layer}"
            )
    if own.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for layer in layers:
        layer.__class__ = SharedBatchNorm  # its parameters and buffers are the same ones
    return network
