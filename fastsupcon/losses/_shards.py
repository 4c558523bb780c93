"""Prototypes that are shared out among the ranks of a group: the problem, what only their owner knows of a row, the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from ..backends import sum_dtype
from ..distributed import Shared
from ..options import Across
from ..problem import Pairs
from ..ranks import Ranks, outside_of_graphs
from ._frame import ranks_of
from ._prototypes import PrototypeLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def ranks_of_shards(group: ProcessGroup | None, across: Across, sharded: bool) -> Ranks | None:
    """ranks_of, for a loss whose prototypes may be shards."""
    if not isinstance(sharded, bool):
        raise TypeError(f"sharded must be a bool, got {type(sharded).__name__}")
    if sharded and group is None:
        raise ValueError("sharded=True needs a group, got None: this process has all prototypes")
    return ranks_of(group, across)


def against_shards(pairs: Pairs, ranks: Ranks, per_class: int = 1) -> Shared:
    """This rank's rows against all ranks' prototypes, of which ``pairs`` has this one's, their keys numbered from 0; the rows travel."""
    keys = pairs.column_keys
    if keys is not None:
        keys = keys + ranks.first("prototypes") // per_class
    return Shared(pairs._replace(column_keys=keys), ranks, "rows", "prototypes", rows_travel=True)


@outside_of_graphs
@torch.no_grad()
def of_owners(
    value: Callable[[dict[str, Tensor], Tensor], Tensor],
    labels: Tensor,
    prototypes: Tensor,
    ranks: Ranks,
    per_class: int = 1,
    **rows: Tensor,
) -> Tensor:
    """[N] in the sum dtype, without gradient: ``value`` of each row, which is computed by the rank that has its class.

    It is given the ``rows`` [n, ...] of some, and the numbers that their classes have among the owner's.
    """
    first, count = (number // per_class for number in (ranks.first("prototypes"), len(prototypes)))
    values = prototypes.new_zeros(ranks.total("rows"), dtype=sum_dtype(prototypes.dtype))
    for owner, block in ranks.blocks({"labels": labels, **rows}, "rows"):
        own = block["labels"] - first
        here = (own >= 0) & (own < count)
        if count and len(own):
            begin = ranks.first("rows", owner or 0)
            values[begin : begin + len(own)] = torch.where(here, value(block, torch.where(here, own, 0)), 0)
    owners, *others = ranks.exchange(values, "rows")
    for other in others:  # 0 from all but one
        owners = owners + other
    return owners


class ShardableLoss(PrototypeLoss):
    """With ``sharded=True`` rank r of R has the prototypes of the classes num_classes r // R ... num_classes (r + 1) // R - 1 alone.

    They are what one process with the same seed would begin with, and each rank draws them all, a few at a time, so that its random state
    goes on as anybody's. Their gradient is that of one process, and nobody must average it: keep the module out of what
    DistributedDataParallel or FSDP wraps. Their optimiser's state is each rank's own.

    ``state_dict()`` has this rank's prototypes and class counts, ``whole_state_dict()`` those of all; ``load_state_dict`` takes either, so
    what is saved whole goes on with any number of ranks, or in one process.
    """

    group: ProcessGroup | None
    across: Across
    sharded: bool

    def __init__(
        self, num_classes: int, dim: int, per_class: int = 1, class_counts: Tensor | Sequence[float] | None = None, **options: Any
    ) -> None:
        ranks = ranks_of_shards(options["group"], options["across"], options["sharded"])
        _checks.size("num_classes", num_classes)
        own = None
        if options["sharded"] and ranks is not None:
            own = range(*(num_classes * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1)))
        super().__init__(num_classes, dim, per_class, class_counts, own, **options)
        self._are_apart = False

    def logits(self, features: Tensor) -> Tensor:
        """z_i . p_c / tau: [N, D] -> [N, num_classes]; with several prototypes per class the log-sum-exp over them.

        Of shards too: all ranks call it, each with its own rows, and the prototypes travel (``across``). There it has no gradient.

        Raises:
            RuntimeError: the prototypes are shards, and gradients are not off (``torch.no_grad()``).
        """
        if not self.sharded:
            return super().logits(features)
        if torch.is_grad_enabled():
            raise RuntimeError("logits of sharded prototypes have no gradient: call it under torch.no_grad()")
        _checks.rows("features", features, columns=self.prototypes.shape[1], least=0)
        ranks = self._met("PrototypeLoss.logits", features, rows=len(features))
        logits = features.new_empty(len(features), self.num_classes, dtype=sum_dtype(features.dtype))
        for owner, block in ranks.blocks({"prototypes": self.prototypes}, "prototypes"):
            first, count = (number // self.per_class for number in (ranks.first("prototypes", owner or 0), len(block["prototypes"])))
            logits[:, first : first + count] = self._logits(features, block["prototypes"], self.temperature, self.normalize)
        return logits

    @outside_of_graphs
    def _check_apart(self) -> None:
        """Of shards, at the first call and after each load: a ValueError on all ranks where two have the same, and not each its own.

        DistributedDataParallel makes copies of rank 0's when it wraps them, and so does a checkpoint of one rank's that all ranks load.
        """
        if self._are_apart:
            return
        ranks = self._met("the first call of a loss with shards", self.prototypes, first=min(1, len(self.prototypes)))
        firsts = ranks.gather(self.prototypes[:1], "first")
        if len(firsts.unique(dim=0)) < len(firsts):
            raise ValueError(
                "prototypes of two ranks begin with the same row, where each must have its own: keep the loss out of what "
                "DistributedDataParallel wraps, and load what whole_state_dict() gave or each rank's own"
            )
        self._are_apart = True

    def whole_state_dict(self) -> dict[str, Any]:
        """state_dict() as one process has it, the same on every rank; all ranks call it. Of prototypes that are no shards: state_dict()."""
        state: dict[str, Any] = self.state_dict()
        if self.sharded:
            ranks = self._met("PrototypeLoss.whole_state_dict", self.prototypes, classes=len(self.prototypes) // self.per_class)
            kinds = {"prototypes": "prototypes", "class_counts": "classes"}
            state |= {name: ranks.gather(state[name], kind) for name, kind in kinds.items() if name in state}
        return state

    def _met(self, name: str, like: Tensor, **counts: int) -> Ranks:
        ranks = ranks_of_shards(self.group, self.across, self.sharded)
        if ranks is None:
            raise AssertionError("shards have a group")
        ranks.meet(name, like.device, {"prototypes": len(self.prototypes), **counts}, dtype=self.prototypes.dtype)
        return ranks

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        if self.sharded:  # of a whole one this rank's part
            for name, per_class in (("prototypes", self.per_class), ("class_counts", 1)):
                x = state_dict.get(prefix + name)
                if isinstance(x, Tensor) and x.ndim and len(x) == self.num_classes * per_class:
                    state_dict = {**state_dict, prefix + name: x[self.own.start * per_class : self.own.stop * per_class]}
        self._are_apart = False
        super()._load_from_state_dict(state_dict, prefix, *arguments)
