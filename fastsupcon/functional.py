"""The losses as pure functions, and the log-sum-exp beneath for losses of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import _checks
from .backends import sum_dtype
from .blocks import terms
from .losses._contrast import shared
from .losses._frame import ranks_of, said
from .losses.balanced import balanced_supcon_loss
from .losses.infonce import info_nce_loss
from .losses.ntxent import nt_xent_loss
from .losses.paco import paco_loss
from .losses.prototypes import prototype_cross_entropy
from .losses.psc import psc_loss
from .losses.supcon import supcon_loss
from .options import Across, Backend
from .problem import Pairs
from .rows import wide_number

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "balanced_supcon_loss",
    "cross_logsumexp",
    "info_nce_loss",
    "nt_xent_loss",
    "paco_loss",
    "prototype_cross_entropy",
    "psc_loss",
    "self_logsumexp",
    "supcon_loss",
]


def __dir__() -> list[str]:
    """What completion offers."""
    return __all__


def self_logsumexp(
    z: Tensor, *, scale: float | Tensor = 1.0, group: ProcessGroup | None = None, across: Across = "gather", backend: Backend = "auto"
) -> Tensor:
    """log sum over j != i of exp(z_i . z_j * scale).

    Equivalent to:

        logits = z @ z.T * scale
        logits.fill_diagonal_(-torch.inf).logsumexp(1)

    Args:
        z: rows [N, D], any floating dtype.
        scale: 1 / temperature, a number or a tensor of one element, which may require grad.
        group: the process group whose ranks' rows z meets: j runs over the rows of all of them, of which each calls with its own, as many
            as it has. The gradient is that of the sum of what the ranks make of their results. None: this process alone.
        across: how rows of other ranks come: "gather" them all, or a rank's at a time by a "ring".
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        [N] in float32, for float64 rows in float64. With N = 1 there is nothing to sum: -inf, and no gradient.

    Raises:
        TypeError, ValueError: ``z`` is no floating-point [N, D] with N, D >= 1; ``scale`` is no number and no tensor of one element; the
            backend is unknown or cannot serve this.

    Cost: N^2 D flops forward, as a pair of rows is visited once, and 3 to 4 N^2 D backward; memory O(N D).
    """
    ranks = ranks_of(group, across)
    _checks.rows("z", z, least=1 if ranks is None else 0)
    _checks.scale("scale", scale)
    if ranks is not None:
        alike = {"depth": z.shape[1], "dtype": z.dtype, "requires_grad": z.requires_grad, "scale": said(scale)}
        ranks.meet("self_logsumexp", z.device, {"rows": len(z)}, **alike)
    return terms(shared(Pairs(z, scale=wide_number(scale, z)), ranks, "rows", "rows"), ("all",), backend=backend)[0][0]


def cross_logsumexp(
    a: Tensor,
    b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    row_labels: Tensor | None = None,
    column_labels: Tensor | None = None,
    group: ProcessGroup | None = None,
    across: Across = "gather",
    backend: Backend = "auto",
) -> Tensor:
    """log sum over the columns j allowed for row i of exp(a_i . b_j * scale + bias_j), with gradients for a, b, bias and scale.

    Equivalent, for ``skip``, to:

        logits = a @ b.T * scale + bias
        logits.scatter(1, skip[:, None], -torch.inf).logsumexp(1)

    Args:
        a: rows [N, D].
        b: columns [M, D], of a's dtype and on its device.
        scale: 1 / temperature, a number or a tensor of one element, which may require grad.
        bias: floating [M], added to the logits.
        skip: integer [N], one excluded column per row; -1 excludes none.
        row_labels: integer [N]: all columns of the row's own label are excluded. Not together with ``skip``.
        column_labels: integer [M], given together with ``row_labels``.
        group: the process group whose ranks' columns the rows meet: j runs over the columns of all of them, rank after rank, and ``skip``
            numbers these. Each rank calls with its own rows and its own columns, their biases and labels, as many as it has. The gradient
            is that of the sum of what the ranks make of their results. None: this process alone.
        across: how columns of other ranks come: "gather" them all, or a rank's at a time by a "ring".
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        [N] in float32, for float64 rows in float64. A row that allows no column has -inf and passes no gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; both exclusion rules are given; the backend
            is unknown or cannot serve this. On a GPU ``skip`` out of range is a device-side assertion: reading it back would wait.

    Cost: 2 N M D flops forward, 6 N M D backward; memory O((N + M) D).
    """
    ranks = ranks_of(group, across)
    least = 1 if ranks is None else 0
    _checks.rows("a", a, least=least)
    _checks.rows_like("b", b, "a", a, least=least)
    _checks.scale("scale", scale)
    if bias is not None:
        _checks.vector("bias", bias, len(b), a.device, floating=True)
        bias = bias.to(sum_dtype(a.dtype))
    if (row_labels is None) != (column_labels is None):
        missing, given = ("row_labels", "column_labels") if row_labels is None else ("column_labels", "row_labels")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if row_labels is not None and column_labels is not None:
        if skip is not None:
            raise ValueError("skip and row_labels/column_labels are two exclusion rules: expected at most one, got both")
        _checks.vector("row_labels", row_labels, len(a), a.device)
        _checks.vector("column_labels", column_labels, len(b), a.device)
        row_labels, column_labels = row_labels.long(), column_labels.long()
    if ranks is not None:
        ranks.meet(
            "cross_logsumexp",
            a.device,
            {"rows": len(a), "columns": len(b)},
            depth=a.shape[1],
            dtype=a.dtype,
            requires_grad=(a.requires_grad, b.requires_grad),
            scale=said(scale),
            bias=said(bias),
            skip=skip is not None,
            labels=row_labels is not None,
        )
    if skip is not None:
        _checks.vector("skip", skip, len(a), a.device)
        _checks.within("skip", skip, -1, len(b) if ranks is None else ranks.total("columns"))
        skip = skip.long()
    pairs = Pairs(a, b, wide_number(scale, a), False, bias, row_labels, column_labels, skip)
    return terms(shared(pairs, ranks, "rows", "columns"), ("different",), backend=backend)[0][0]
