"""Backends: the ways to compute one primitive, the log-sum-exp over pairs of rows, and its gradient.

    lse_i = log sum_{j allowed for i} exp(a_i . b_j * scale + bias_j)

A backend is one module with the functions of :class:`Backend`. It knows nothing of classes or reductions.

The caller (``ops.py``) guarantees: all tensors contiguous and on one device; ``a`` [N, D] and ``b`` [M, D] of one dtype; ``bias`` [M],
``lse`` and ``grad`` [N] in the sum dtype (:func:`sum_dtype`); ``skip``, ``row_labels`` [N] and ``column_labels`` [M] int64; N, M, D >= 1;
at most one exclusion rule. The backend guarantees: a row with no allowed column has lse -inf and passes no gradient, NaN is never
hidden, the same call gives the same bits.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from . import chunked, cpu, cuda, reference, triton
from ._dtypes import sum_dtype

__all__ = ["BACKENDS", "FASTEST_FIRST", "Backend", "select", "sum_dtype"]


class Backend(Protocol):
    """What each module in this package provides."""

    def unusable(self, device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
        """Why this backend cannot serve such rows here, or None if it can."""

    def self_forward(self, z: Tensor, scale: float, unit_rows: bool) -> Tensor:
        """lse [N] over j != i of z_i . z_j * scale. ``unit_rows``: the caller has normalised the rows, so |z_i| <= 1 up to rounding."""

    def self_backward(self, z: Tensor, lse: Tensor, grad: Tensor, scale: float, unit_rows: bool) -> Tensor:
        """dz_i = scale * sum_{j != i} (g_i P_ij + g_j P_ji) z_j, in z's dtype."""

    def cross_forward(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        skip: Tensor | None,
        row_labels: Tensor | None,
        column_labels: Tensor | None,
        scale: float,
    ) -> Tensor:
        """lse [N]. ``skip``: one excluded column per row, -1 for none; labels: columns of the row's own label are excluded."""

    def cross_backward(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        skip: Tensor | None,
        row_labels: Tensor | None,
        column_labels: Tensor | None,
        lse: Tensor,
        grad: Tensor,
        scale: float,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(da, db, dbias); None where ``needs`` (rows, columns, bias) is False."""


#: Every backend by name. ``backend="auto"`` tries those of :data:`FASTEST_FIRST`.
BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "chunked": chunked, "reference": reference}
FASTEST_FIRST = ("cuda", "cpu", "triton", "chunked")  # on the CPU, Triton is its interpreter


@functools.cache
def select(name: str, device: torch.device, dtype: torch.dtype, depth: int) -> str:
    """The backend that serves rows of ``depth`` and ``dtype`` on ``device``: ``name`` itself, or for "auto" the fastest.

    Raises:
        ValueError: ``name`` is unknown, or cannot serve such rows here. The text says why, and what can.
    """
    reasons = {known: module.unusable(device, dtype, depth) for known, module in BACKENDS.items() if name in ("auto", known)}
    if name == "auto":
        for candidate in FASTEST_FIRST:
            if reasons[candidate] is None:
                return candidate
    elif name in BACKENDS and reasons[name] is None:
        return name
    usable = [known for known, module in BACKENDS.items() if module.unusable(device, dtype, depth) is None]
    why = "; ".join(f"{known}: {reason}" for known, reason in reasons.items() if reason) or f"known are {', '.join(BACKENDS)} and auto"
    raise ValueError(
        f"backend={name!r} cannot serve {dtype} rows of dimension {depth} on {device} ({why}). Usable here: {', '.join(usable) or 'none'}"
    )
