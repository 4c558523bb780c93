"""Several processes as other libraries mean them: an option says whether to gather, and from torch.distributed's default group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..ranks import Ranks


def world(gather: bool) -> dist.ProcessGroup | None:
    """The default group at this moment, if rows are to be gathered and it has more processes than this one; else None, this one alone."""
    if gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def mean_of_own(losses: Tensor, ranks: Ranks | None, kind: str) -> Tensor:
    """Of this process's losses, rows of ``kind``: what DistributedDataParallel's average makes the mean over all ranks' losses of.

    Where ranks have unlike numbers of rows, the mean of its own is not that: it is weighted by how many it has.
    """
    if ranks is None:
        return losses.mean()
    return losses.sum() * (ranks.size / ranks.total(kind))
