"""The definition, written down: holds the N x M matrix, serves any device and floating dtype.

The oracle of the tests and the differentiable form of the gradient, from which second derivatives come; choose it to read, not to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import LOG_SUMS, Gradients, Line, Pairs, Side, Terms
from ._dtypes import exact, sum_dtype


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    return None if dtype.is_floating_point else f"dtype {dtype} is not floating point"


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_i / |x_i| [N, D], and |x_i| [N, 1]. A row of zeros stays zero, with norm 1; so does one below the normal range."""
    largest = x.detach().abs().amax(1, keepdim=True)  # divided out first: squares of rows near 1e20 or 1e-23 leave fp32's range
    largest = largest + (largest < torch.finfo(x.dtype).tiny)
    x = x / largest
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1)  # below 1 only where the row had no normal number
    return x / norm, norm * largest


def sides(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """a^ [N, D] and b^ [M, D] in the sum dtype, and their norms [N, 1], [M, 1], or None where rows stay as they are."""
    wide = [x.to(sum_dtype(x.dtype)) for x in (pairs.rows, pairs.columns) if x is not None]
    sides = [unit_rows(x) if pairs.unit else (x, None) for x in wide]
    (a, a_norm), (b, b_norm) = sides[0], sides[-1]
    return a, b, a_norm, b_norm


class _Matrices:
    """s, t [N, M], and for every log-sum, and for similarity and count, which pairs it is over."""

    def __init__(self, pairs: Pairs, a: Tensor, b: Tensor) -> None:
        n, m, _ = pairs.shape
        column = torch.arange(m, device=a.device)
        own = column[:n] if pairs.columns is None else pairs.own_column
        pair = torch.ones(n, m, dtype=torch.bool, device=a.device) if own is None else own[:, None] != column
        same = torch.zeros_like(pair)
        if pairs.row_keys is not None:
            same = pairs.row_keys[:, None] == (pairs.row_keys if pairs.column_keys is None else pairs.column_keys)
        self.similarities = a @ b.T * pairs.scale
        self.logits = self.similarities if pairs.bias is None else self.similarities + pairs.bias
        self.over = {"all": pair, "different": pair & ~same, "equal": pair & same}

    def quantity(self, name: str, dim: int) -> Tensor:
        if name == "similarity":
            return torch.where(self.over["equal"], self.similarities, 0).sum(dim)
        if name == "count":
            return self.over["equal"].sum(dim, dtype=self.logits.dtype)
        return self.logits.masked_fill(~self.over[name], -torch.inf).logsumexp(dim)

    def softmax(self, name: str, log_sum: Tensor) -> Tensor:
        """exp(t_ij - q), and 0 where (i, j) is not among the pairs of q; q [N, 1] or [M]. Also where q is over none, and -inf."""
        over = self.over[name]
        return torch.where(over, torch.exp(torch.where(over, self.logits, -torch.inf) - torch.where(log_sum == -torch.inf, 0, log_sum)), 0)


def _stack(quantities: list[Tensor], like: Tensor, length: int) -> Tensor:
    return torch.stack(quantities) if quantities else like.new_empty(0, length)


@exact
def forward(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...], keep: bool) -> Terms:
    a, b, _, _ = sides(pairs)
    matrices, (n, m, _) = _Matrices(pairs, a, b), pairs.shape
    rows = _stack([matrices.quantity(name, 1) for name in row_names], a, n)
    columns = _stack([matrices.quantity(name, 0) for name in column_names], a, m)
    norms = a.new_zeros(pairs.norms_size)  # made anew in the backward
    return Terms(rows, columns, norms, a.new_empty(0))


@exact
def backward(pairs: Pairs, rows: Side, columns: Side, norms: Tensor, kept: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    """w_ij = sum over the log-sums q of (i, j) of g_i exp(t_ij - q_i) + h_j exp(t_ij - q'_j), and u_i + v_j if the keys are equal."""
    a, b, a_norm, b_norm = sides(pairs)
    matrices = _Matrices(pairs, a, b)
    weights = linear = torch.zeros_like(matrices.logits)
    for side, dim in ((rows, 1), (columns, 0)):
        for name, value, grad in zip(side.names, side.values, side.grads, strict=True):
            value, grad = value.unsqueeze(dim), grad.unsqueeze(dim)
            if name in LOG_SUMS:
                weights = weights + grad * matrices.softmax(name, value)
            elif name == "similarity":
                linear = linear + torch.where(matrices.over["equal"], grad, 0)
    w = weights + linear
    scale_grad = (w * (a @ b.T)).sum() if needs[3] else None
    if pairs.columns is None:
        w = w + w.T
    return Gradients(
        through_unit(pairs.scale * (w @ b), a, a_norm).to(pairs.rows.dtype) if needs[0] else None,
        through_unit(pairs.scale * (w.T @ a), b, b_norm).to(pairs.rows.dtype) if needs[1] else None,
        weights.sum(0) if needs[2] else None,
        scale_grad,
    )


def through_unit(grad: Tensor, unit: Tensor, norm: Tensor | None) -> Tensor:
    """(g_i - u_i (u_i . g_i)) / |x_i|: the gradient of x from that of u = x / |x|."""
    return grad if norm is None else (grad - unit * (unit * grad).sum(1, keepdim=True)) / norm


def line(names: tuple[str, ...], values: Tensor, line: Line) -> Tensor:
    """The loss of the rows' quantities ``values`` [len(names), N], which are those of ``line.names``: 0-d, or [N] with reduction="none"."""
    of = dict(zip(names, values, strict=True))
    paired = of["count"] > 0
    count = of["count"].clamp_min(1)
    losses = sum(getattr(line, name) * of[name] for name in LOG_SUMS if name in of)
    if "similarity" in of:
        losses = losses + line.similarity * (of["similarity"] / count)
    losses = line.factor * (losses + line.log_count * count.log())
    shown = paired | losses.isnan()  # an input that is not finite is never hidden
    for name in ("all", "different"):
        shown = shown | (of[name] == torch.inf) if name in of else shown
    losses = torch.where(shown, losses, torch.nan if line.lone == "nan" else 0)
    if line.reduction == "none":
        return losses
    return losses.sum() / (_divisor(paired, line) if line.reduction == "mean" else 1)


def line_backward(names: tuple[str, ...], values: Tensor, grad: Tensor, line: Line) -> Tensor:
    """Gradients of the quantities, [len(names), N], from that of the loss."""
    count = values[names.index("count")]
    paired = count > 0
    grad = grad * line.factor / (_divisor(paired, line) if line.reduction == "mean" else 1)
    grad = torch.where(paired, grad, torch.nan if line.lone == "nan" else 0)
    of = {name: grad * getattr(line, name) for name in LOG_SUMS} | {"similarity": grad * line.similarity / count.clamp_min(1)}
    return torch.stack([of.get(name, torch.zeros_like(grad)) for name in names])


def _divisor(paired: Tensor, line: Line) -> Tensor | int:
    return paired.sum().clamp_min(1) if line.lone == "skip" else paired.shape[0]  # not len(), which torch.export would take for a constant
