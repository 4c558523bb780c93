"""The processes of a group in one call of a loss: what each brings, and what they tell each other. PyTorch's engine carries it."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .options import ACROSS, Across

_COUNTS, _TEXT = 8, 960  # numbers and bytes in which a rank says what it was called with


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def outside_of_graphs(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """torch.compiler.disable, but without the two seconds that importing the compiler takes where nothing is compiled."""
    disabled: list[Callable[_Parameters, _Result]] = []

    @functools.wraps(function)
    def call(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        if "torch._dynamo" not in sys.modules:
            return function(*arguments, **options)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*arguments, **options)

    return call


class Ranks:
    """One call's view of a process group. ``rank`` is this process's number in it, ``size`` how many there are.

    ``across`` says how rows of other ranks are met: "gather" brings all of them here, "ring" a rank's at a time.
    """

    def __init__(self, group: dist.ProcessGroup, across: Across) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
        if across not in ACROSS:
            raise ValueError(f"across must be one of {', '.join(map(repr, ACROSS))}, got {across!r}")
        self.group, self.across = group, across
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must hold this process, got one that does not")
        self.counts: dict[str, list[int]] = {}

    @outside_of_graphs
    def meet(self, loss: str, device: torch.device, counts: Mapping[str, int], **alike: object) -> None:
        """Tells all ranks how many rows of each kind this one has, and asks that ``alike`` be the same everywhere.

        Of the first kind in ``counts`` there must be some. This goes through the hosts' memory where the group has a backend for that, and
        no GPU is waited for.

        Raises:
            ValueError, on every rank: the ranks disagree; the text says which and on what.
            RuntimeError: a rank did not come within the group's timeout.
        """
        alike = {"loss": loss, "across": self.across, "device": device.type, "grad_enabled": torch.is_grad_enabled()} | alike
        text = json.dumps({name: str(x) for name, x in alike.items()}).encode().ljust(_TEXT)
        if len(text) > _TEXT or len(counts) > _COUNTS:
            raise AssertionError(f"what {loss} was called with takes {len(text)} bytes and {len(counts)} counts, more than expected")
        here = torch.tensor([*counts.values(), *[0] * (_COUNTS - len(counts))]).view(torch.uint8)
        here = torch.cat([here, torch.frombuffer(bytearray(text), dtype=torch.uint8)])
        by = torch.device("cpu") if _carries_host_memory(self.group) else device
        there = torch.empty(self.size * len(here), dtype=torch.uint8, device=by)
        with self._named(f"{loss}, first of all"):
            _all_gather(there, here.to(by), group=self.group)
            there = there.cpu()
        counted, texts = there.view(self.size, -1).tensor_split([8 * _COUNTS], dim=1)
        if not torch.equal(texts, texts[:1].expand_as(texts)):
            self._refuse([json.loads(bytes(one)) for one in texts.tolist()])
        self.counts = dict(zip(counts, counted.contiguous().view(torch.int64).T.tolist(), strict=False))
        if not self.total(first := next(iter(counts))):
            raise ValueError(f"{loss} needs {first} on at least one rank of the group, got none on all {self.size}")

    def _refuse(self, said: list[dict[str, str]]) -> NoReturn:
        """What the ranks first disagree on; on which loss, where they say unlike things of it."""
        names = said[0] if all(one.keys() == said[0].keys() for one in said) else ["loss"]
        for name in names:
            values = [one[name] for one in said]
            if len(set(values)) > 1:
                ranks_of = {value: [str(rank) for rank, other in enumerate(values) if other == value] for value in values}
                found = "; ".join(f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for value, ranks in ranks_of.items())
                raise ValueError(f"{name} must be the same on all ranks of the group, got {found}")
        raise AssertionError(f"ranks said unlike things of one loss: {said}")

    def total(self, kind: str) -> int:
        return sum(self.counts[kind])

    def first(self, kind: str, rank: int | None = None) -> int:
        """The number, among all ranks' rows of a kind, of a rank's first; of this one's by default."""
        return sum(self.counts[kind][: self.rank if rank is None else rank])

    def gather(self, x: Tensor, kind: str) -> Tensor:
        """Of all ranks, [total, ...] from [own count, ...], in their order; without gradient. Bits travel, so any dtype will do."""
        counts = self.counts[kind]
        most = max(counts)
        sent = _packed(x)
        if len(x) < most:
            sent = torch.cat([sent, sent.new_zeros(most - len(x), *x.shape[1:])])
        received = sent.new_empty(self.size * most, *x.shape[1:])
        if received.numel():
            with self._named("gathering rows"):
                _all_gather(_bytes(received), _bytes(sent), group=self.group)
        if min(counts) == most:
            return received
        return torch.cat([part[:count] for part, count in zip(received.split(most), counts, strict=True)])

    def exchange(self, x: Tensor, kind: str, owner: int | None = None) -> list[Tensor]:
        """x [total, ...] holds something for each row of every rank: [own count, ...] from each rank for the rows of this one.

        With an ``owner``, as ``blocks`` gives it by the ring, x is for that rank's rows alone, and this one's come from the one rank that
        has its block. The order of what comes is the same each time.
        """
        counts, here = self.counts[kind], self.counts[kind][self.rank]
        takers = range(self.size) if owner is None else [owner]
        givers = range(self.size) if owner is None else [(2 * self.rank - owner) % self.size]
        sent = _packed(x)
        received = sent.new_empty(len(givers) * here, *x.shape[1:])
        width = math.prod(x.shape[1:]) * x.element_size()
        with self._named("exchanging partial sums"):
            dist.all_to_all_single(
                _bytes(received),
                _bytes(sent),
                [here * width if rank in givers else 0 for rank in range(self.size)],
                [counts[rank] * width if rank in takers else 0 for rank in range(self.size)],
                group=self.group,
            )
        return list(received.split(here)) if here else [received] * len(givers)

    @outside_of_graphs
    def sum(self, x: Tensor, *, others: bool = False) -> Tensor:
        """Over all ranks, in their order, so that all have the same bits; or over the ``others``. Its gradient is that sum of theirs."""
        total: Tensor = _Sum.apply(x, self, others)  # type: ignore[no-untyped-call]  # torch's
        return total

    @outside_of_graphs
    def gather_values(self, x: Tensor, kind: str) -> Tensor:
        """As ``gather``. The gradient of this rank's values is the sum of all ranks' gradients of them."""
        values: Tensor = _Gather.apply(x, self, kind)  # type: ignore[no-untyped-call]  # torch's
        return values

    def sum_here(self, x: Tensor, *, others: bool = False) -> Tensor:
        """The same without gradient."""
        received = x.new_empty(self.size, *x.shape)
        with self._named("adding up"):
            _all_gather(_bytes(received), _bytes(_packed(x)), group=self.group)
        return torch.cat([received[: self.rank], received[self.rank + 1 :]]).sum(0) if others else received.sum(0)

    def blocks(self, payload: Mapping[str, Tensor], kind: str) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
        """Tensors [own count, ...] of every rank, a block at a time: the rank whose they are, and they.

        One block of all rows, which is no single rank's (None); by the ring a rank's at a time, this one's first, while the next is on its
        way. A block may be empty.
        """
        if self.across == "gather":
            yield None, {name: self.gather(x, kind) for name, x in payload.items()}
            return
        here = {name: _packed(x) for name, x in payload.items()}
        for step in range(self.size):
            source, after = ((self.rank - behind) % self.size for behind in (step, step + 1))
            coming: dict[str, Tensor] = {}
            requests = []
            if step + 1 < self.size:
                coming = {name: x.new_empty(self.counts[kind][after], *x.shape[1:]) for name, x in here.items()}
                requests = self._pass_on(here, coming)
            yield source, here
            with self._named("passing rows on"):
                for request in requests:
                    request.wait()
            here = coming

    def _pass_on(self, here: Mapping[str, Tensor], coming: Mapping[str, Tensor]) -> list[Any]:
        to, of = ((self.rank + step) % self.size for step in (1, -1))
        operations = []
        for sent, received in zip(here.values(), coming.values(), strict=True):
            if sent.numel():
                operations.append(dist.P2POp(dist.isend, _bytes(sent), dist.get_global_rank(self.group, to), self.group))
            if received.numel():
                operations.append(dist.P2POp(dist.irecv, _bytes(received), dist.get_global_rank(self.group, of), self.group))
        with self._named("passing rows on"):
            return list(dist.batch_isend_irecv(operations)) if operations else []

    @contextlib.contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"fastsupcon: rank {self.rank} of {self.size} lost the others while {doing}: a rank ended, raised an error, or did not "
                f"call the loss as often as this one within the group's timeout. torch.distributed says: {error}"
            ) from error


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, others: bool) -> Tensor:
        ctx.ranks, ctx.others = ranks, others
        return ranks.sum_here(x, others=others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.sum(grad, others=ctx.others), None, None  # differentiable again


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, kind: str) -> Tensor:
        ctx.ranks, ctx.kind = ranks, kind
        return ranks.gather(x, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ranks, first = ctx.ranks, ctx.ranks.first(ctx.kind)
        return ranks.sum(grad)[first : first + ranks.counts[ctx.kind][ranks.rank]], None, None


def _all_gather(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 gave it another name
    gather(received, sent, group=group)


def _packed(x: Tensor) -> Tensor:
    return x.detach().resolve_neg().contiguous()


def _bytes(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)  # a single number is contiguous at any stride, which view() would keep


def _carries_host_memory(group: dist.ProcessGroup) -> bool:
    """A group of NCCL alone does not; init_process_group() without a backend makes one of gloo beside it."""
    return "cpu" in (entry.split(":")[0] for entry in dist.get_backend_config(group).split(","))
