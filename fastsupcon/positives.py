"""Positives that no key can name: by a mask, by several labels a row, by lists, and the prototypes of the own class.

Their similarities are linear in the rows, so no N x N product is formed:

    sum_p w_ip z_i . z_p = z_i . (W Z)_i

No pair of a row with itself is added and then taken out: a row that is long, or a weight that is large, would leave nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .backends._dtypes import no_autocast
from .ranks import Ranks
from .rows import wide_rows

#: An anchor whose weights sum to no more than this part of the largest weight has no positive, as if they were 0. That is SupContrast's
#: bound for weights of 0 and 1, and for any others it is the same at every scale.
LEAST_WEIGHT = 1e-6


class _Product(torch.autograd.Function):
    """a @ b whose gradients autocast does not round, where a user's autocast reaches around the backward as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with no_autocast(grad):
            return (
                _product(grad, b.mT) if ctx.needs_input_grad[0] else None,
                _product(a.mT, grad) if ctx.needs_input_grad[1] else None,
            )


_product: Callable[[Tensor, Tensor], Tensor] = _Product.apply


def mask_positives(z: Tensor, mask: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """The weighted mean of each row's similarities z_i . z_p (0 without a positive) and whether it has one, both [V B].

    z [V B, D] holds V views of B samples, view-major. Entry (b, c) >= 0 of the mask [B, B] weighs sample c as a positive of sample b, for
    every pair of their views but a row with itself.
    """
    z = wide_rows(z, unit)
    mask = mask.to(z.dtype)
    views = z.shape[0] // mask.shape[0]
    v = z.unflatten(0, (views, -1))  # [V, B, D]
    itself = torch.eye(len(mask), dtype=torch.bool, device=mask.device)
    others = mask.masked_fill(itself, 0)
    weighted = _product(others, v.sum(0))  # [B, D]
    weight, largest = views * others.sum(1), others.amax()
    if views > 1:  # the other views of the same sample
        own = mask.diagonal()
        weighted = weighted + own[:, None] * _of_others(v)
        weight, largest = weight + (views - 1) * own, torch.maximum(largest, own.amax())
    least = LEAST_WEIGHT * torch.nan_to_num(largest, nan=0, posinf=0)  # what is not finite makes nobody lone
    mean, paired = _mean((v * weighted).sum(2), weight, least)
    return mean.flatten(), paired.repeat(views)


def _of_others(x: Tensor) -> Tensor:
    """The sums over all but one of the first dimension, of each."""
    others = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    sums: Tensor = _product(others, x.flatten(1)).unflatten(1, x.shape[1:])
    return sums


def _mean(weighted: Tensor, weight: Tensor, least: float | Tensor) -> tuple[Tensor, Tensor]:
    """Sums over their weights, 0 where there is no positive, and where there is one: whose weights sum to more than ``least``."""
    paired = ~(weight <= least)  # a NaN is no weight of nothing
    return torch.where(paired, weighted / torch.where(paired, weight, 1), 0), paired


def shared_label_positives(z: Tensor, labels: Tensor, unit: bool, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """The same for labels [V B, C] >= 0 of several classes at once: y_i . y_p weighs row p as a positive of row i.

        sum_{p != i} (y_i . y_p) z_p = y_i (sum_{p in other blocks} y_p^T z_p) + sum_{p in i's block, p != i} (y_i . y_p) z_p

    Blocks are of T = (C + D) / 2 rows, or 64, and those of the other ranks come as one. 4 N C D + 2 N T (C + D) + 2 (N / T)^2 C D flops,
    and N T + N C D / T numbers of memory, which is O(N (C + D)), as labels and rows are.
    """
    z = wide_rows(z, unit)
    rows, classes = labels.shape
    size = max(1, min(rows, max(64, (classes + z.shape[1]) // 2)))
    blocks = (0, 0, 0, -rows % size)
    y = pad(labels.to(z.dtype), blocks).unflatten(0, (-1, size))  # [blocks, T, C]
    x = pad(torch.cat([z, torch.ones_like(z[:, :1])], 1), blocks).unflatten(0, (-1, size))  # the ones sum the weights
    of_block = _product(y.mT, x)  # [blocks, C, D + 1]
    elsewhere = _of_others(of_block)
    if ranks is not None:
        elsewhere = elsewhere + ranks.sum(of_block.sum(0), others=True)
    inside = _product(y, y.mT).masked_fill(torch.eye(size, dtype=torch.bool, device=z.device), 0)
    weighted = (_product(y, elsewhere) + _product(inside, x)).flatten(0, 1)[:rows]
    return _mean((z * weighted[:, :-1]).sum(1), weighted[:, -1], 0.0)


def listed_positives(z: Tensor, columns: Tensor | None, positives: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """The mean of z_i . p over the columns p that ``positives`` [A, K] lists for each of the first A rows, and whether it lists one.

    -1 lists none; nor does the row's own number, where the columns are the rows themselves (None). O(A K D) memory.
    """
    z, positives = wide_rows(z, unit), positives.long()
    listed = positives >= 0
    if columns is None:
        listed &= positives != torch.arange(len(positives), device=z.device)[:, None]
    of_columns = z if columns is None else wide_rows(columns.to(z.dtype), unit)
    of_each = torch.nn.functional.embedding(torch.where(listed, positives, 0), of_columns)  # its gradient is the same bits on every device
    similarities = (of_each * z[: len(positives), None]).sum(2).masked_fill(~listed, 0)
    count = listed.sum(1)
    return similarities.sum(1) / count.clamp_min(1), count > 0


def own_prototypes(z: Tensor, prototypes: Tensor, labels: Tensor, per_class: int, unit: bool) -> Tensor:
    """z_i . p for the M prototypes p of i's own class; class c has rows c M ... c M + M - 1 of [C M, D]: [N, M] in the sum dtype."""
    z, p = wide_rows(z, unit), wide_rows(prototypes, unit)
    own = labels[:, None] * per_class + torch.arange(per_class, device=z.device)
    # embedding's gradient is the same bits on every device, indexing's is not
    return (torch.nn.functional.embedding(own, p) * z[:, None]).sum(2)
