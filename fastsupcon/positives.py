"""The positive term is linear: sum_{p in P(i)} z_i . z_p = z_i . (W Z)_i - w_ii |z_i|^2, so it costs O(N D) and needs no N x N mask.

For labels, (W Z)_i is the sum C_y of the rows of the anchor's class. For a dense or soft mask between samples, W is that mask, the same for
every pair of views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends._dtypes import sum_dtype
from .rows import sum_rows


def compact(labels: Tensor) -> tuple[Tensor, int]:
    """Any int64 labels [N] -> ids [N] numbered from 0 in the labels' order, and a bound on how many there are.

    The bound is exact on the CPU. Elsewhere, and under torch.compile, it is N: the exact number would have to be read back.
    """
    ordered, order = torch.sort(labels)
    rank = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).cumsum(0)])
    ids = torch.empty_like(rank).scatter_(0, order, rank)
    exact = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    return ids, int(rank[-1]) + 1 if exact else labels.shape[0]


class _LabelPositives(torch.autograd.Function):
    """t_i = z_i . (C_{y_i} - z_i) with C_y = sum_{y_j = y} z_j; dz_i = h_i (C_{y_i} - 2 z_i) + sum_{y_j = y_i} h_j z_j."""

    @staticmethod
    def forward(ctx, z, ids, classes):
        class_sums = sum_rows(z, ids, classes)
        ctx.save_for_backward(z, ids, class_sums)
        return class_sums.index_select(0, ids).sub_(z).mul_(z).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, h):
        z, ids, class_sums = ctx.saved_tensors
        weighted_sums = sum_rows(z * h[:, None], ids, len(class_sums))
        dz = class_sums.index_select(0, ids).sub_(z, alpha=2).mul_(h[:, None])
        return dz.add_(weighted_sums.index_select(0, ids)).to(z.dtype), None, None


def label_positives(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of z [N, D] the sum of its similarities z_i . z_p to the other rows of its label, and their number: [N], [N]."""
    ids, classes = compact(labels)
    count = ids.new_zeros(classes).scatter_add_(0, ids, torch.ones_like(ids)).index_select(0, ids) - 1
    return _LabelPositives.apply(z, ids, classes), count.to(sum_dtype(z.dtype))


def mask_positives(z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a mask [B, B] of weights between samples, where z [V B, D] holds V views of each, view-major: [V B], [V B].

    Entry (b, c) weighs sample c as a positive of sample b, for every pair of their views but a row with itself.
    """
    z = z.to(sum_dtype(z.dtype))
    mask = mask.to(z.dtype)
    views = z.shape[0] // mask.shape[0]
    own = mask.diagonal()
    weighted = mask @ z.unflatten(0, (views, -1)).sum(0)
    positives = (z * weighted.repeat(views, 1)).sum(1) - own.repeat(views) * (z * z).sum(1)
    return positives, (views * mask.sum(1) - own).repeat(views)
