"""The definition, written down: holds the N x M matrix, serves any device and floating dtype.

The oracle of the tests; choose it to read, not to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dtypes import exact, sum_dtype


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    return None if dtype.is_floating_point else f"dtype {dtype} is not floating point"


def _logits(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    row_labels: Tensor | None = None,
    column_labels: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """s_ij = a_i . b_j * scale + bias_j, and -inf where j is not allowed for i: [N, M]."""
    logits = a @ b.T * scale
    if bias is not None:
        logits = logits + bias
    if skip is not None:
        logits = logits.masked_fill(skip[:, None] == torch.arange(len(b), device=b.device), -torch.inf)
    if row_labels is not None:
        logits = logits.masked_fill(row_labels[:, None] == column_labels, -torch.inf)
    return logits


def _probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    """P_ij = exp(s_ij - lse_i), and 0 where j is not allowed, also in a row that allows none (its lse is -inf)."""
    return torch.where(logits == -torch.inf, 0, torch.exp(logits - lse[:, None]))


def _every_row(z: Tensor) -> Tensor:
    return torch.arange(len(z), device=z.device)


@exact
def self_forward(z: Tensor, scale: float, unit_rows: bool) -> Tensor:
    return cross_forward(z, z, None, _every_row(z), None, None, scale)


@exact
def self_backward(z: Tensor, lse: Tensor, grad: Tensor, scale: float, unit_rows: bool) -> Tensor:
    da, db, _ = cross_backward(z, z, None, _every_row(z), None, None, lse, grad, scale, (True, True, False))
    return da + db


@exact
def cross_forward(a, b, bias, skip, row_labels, column_labels, scale) -> Tensor:
    a, b = (rows.to(sum_dtype(rows.dtype)) for rows in (a, b))
    return torch.logsumexp(_logits(a, b, bias, skip, row_labels, column_labels, scale), dim=1)


@exact
def cross_backward(a, b, bias, skip, row_labels, column_labels, lse, grad, scale, needs):
    dtype = a.dtype
    a, b = (rows.to(sum_dtype(dtype)) for rows in (a, b))
    weights = grad[:, None] * _probabilities(_logits(a, b, bias, skip, row_labels, column_labels, scale), lse)  # g_i P_ij
    return (
        (scale * weights @ b).to(dtype) if needs[0] else None,
        (scale * weights.T @ a).to(dtype) if needs[1] else None,
        weights.sum(0) if needs[2] else None,
    )
