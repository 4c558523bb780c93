"""Positives that no key can name: the weights of a mask, and the prototypes of the own class. Linear in the rows, so no N x N product.

    sum_p w_ip z_i . z_p = z_i . (W Z)_i

No pair is added and then taken out: a row that is long, or a weight that is large, would leave nothing of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends._dtypes import no_autocast
from .rows import wide_rows


class _Product(torch.autograd.Function):
    """a @ b whose gradients autocast does not round, where a user's autocast reaches around the backward as well."""

    @staticmethod
    def forward(a, b):
        return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        with no_autocast(grad):
            return (
                _Product.apply(grad, b.T) if ctx.needs_input_grad[0] else None,
                _Product.apply(a.T, grad) if ctx.needs_input_grad[1] else None,
            )


def mask_positives(z: Tensor, mask: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """The weighted mean of each row's similarities z_i . z_p (0 without a positive) and whether it has one, both [V B].

    z [V B, D] holds V views of B samples, view-major. Entry (b, c) of the mask [B, B] weighs sample c as a positive of sample b, for every
    pair of their views but a row with itself.
    """
    z = wide_rows(z, unit)
    mask = mask.to(z.dtype)
    views = z.shape[0] // mask.shape[0]
    v = z.unflatten(0, (views, -1))  # [V, B, D]
    itself = torch.eye(len(mask), dtype=torch.bool, device=mask.device)
    others = mask.masked_fill(itself, 0)
    weighted = _Product.apply(others, v.sum(0))  # [B, D]
    weight = views * others.sum(1)
    if views > 1:  # the other views of the same sample
        other_views = _Product.apply(1 - torch.eye(views, dtype=z.dtype, device=z.device), v.flatten(1))
        own = mask.diagonal()
        weighted = weighted + own[:, None] * other_views.unflatten(1, v.shape[1:])
        weight = weight + (views - 1) * own
    paired = ~(weight.abs() <= 1e-6)  # a NaN is no weight of nothing
    mean = (v * weighted).sum(2) / torch.where(paired, weight, 1)
    return torch.where(paired, mean, 0).flatten(), paired.repeat(views)


def own_prototypes(z: Tensor, prototypes: Tensor, labels: Tensor, per_class: int, unit: bool) -> Tensor:
    """z_i . p for the M prototypes p of i's own class; class c has rows c M ... c M + M - 1 of [C M, D]: [N, M] in the sum dtype."""
    z, p = wide_rows(z, unit), wide_rows(prototypes, unit)
    own = labels[:, None] * per_class + torch.arange(per_class, device=z.device)
    # embedding's gradient is the same bits on every device, indexing's is not
    return (torch.nn.functional.embedding(own, p) * z[:, None]).sum(2)
