"""The mean similarity of each row to its positives.

It is linear: sum_{p in P(i)} z_i . z_p = z_i . (W Z)_i - w_ii |z_i|^2, so it costs O(N D) and needs no N x N mask.

For labels, (W Z)_i is the sum of the rows of the anchor's class. For a dense or soft mask between samples, W is that mask, the same for
every pair of views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends._dtypes import sum_dtype
from .rows import dots_with_others, number_labels


def label_positives(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of z [N, D] the mean of its similarities z_i . z_p to the others of its label (0 without one), and whether one is.

    Returns z to go on with, which must go nowhere but to the log-sum-exp (`exclusive` in rows.py), and both: [N], [N].
    """
    ids, classes, share = number_labels(labels, sum_dtype(z.dtype))
    return *dots_with_others(z, ids, classes, share, exclusive=True), share > 0


def mask_positives(z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same two for a mask [B, B] of weights between samples, where z [V B, D] holds V views of each, view-major: [V B], [V B].

    Entry (b, c) weighs sample c as a positive of sample b, for every pair of their views but a row with itself.
    """
    z = z.to(sum_dtype(z.dtype))
    mask = mask.to(z.dtype)
    views = z.shape[0] // mask.shape[0]
    own = mask.diagonal()
    weighted = mask @ z.unflatten(0, (views, -1)).sum(0)
    positives = (z * weighted.repeat(views, 1)).sum(1) - own.repeat(views) * (z * z).sum(1)
    weight = (views * mask.sum(1) - own).repeat(views)
    has_positive = weight.abs() > 1e-6
    return positives / torch.where(has_positive, weight, 1), has_positive
