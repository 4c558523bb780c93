"""Backends: the ways to compute the terms of the losses and their gradients (problem.py).

A backend is one module, or package, with the functions of :class:`LineBackend` or of :class:`LossBackend`. It knows nothing of classes or
of a loss's name.

The caller (``operators.py``) guarantees: all tensors contiguous and on one device; rows and columns of one dtype; bias, values, grads and a
scale that is a tensor in the sum dtype (:func:`sum_dtype`); keys and own_column int64; N, M, D >= 1. The backend guarantees: log-sums over
no pair are -inf and pass no gradient, NaN is never hidden, the same call gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..problem import Gradients, Line, Pairs, Side, Terms
from . import chunked, cpu, cuda, reference, triton
from ._dtypes import sum_dtype

__all__ = ["BACKENDS", "FASTEST_FIRST", "LineBackend", "LossBackend", "select", "sum_dtype"]


class Backend(Protocol):
    """What each module in this package provides. ``pairs`` comes by position."""

    def unusable(self, device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
        """Why this backend cannot serve such rows here, or None if it can."""

    def forward(self, pairs: Pairs, /, row_names: tuple[str, ...], column_names: tuple[str, ...], keep: bool) -> Terms:
        """The named quantities. ``keep``: there will be a backward, and exponentials may be kept for it (only ``cpu`` is asked)."""

    def backward(
        self, pairs: Pairs, /, rows: Side, columns: Side, norms: Tensor, kept: Tensor, needs: tuple[bool, bool, bool, bool]
    ) -> Gradients:
        """Gradients of rows, columns, bias and scale, each where ``needs`` says so. ``norms`` and ``kept`` are the forward's."""


class LineBackend(Backend, Protocol):
    """A loss is made of its rows' quantities."""

    def line(self, names: tuple[str, ...], values: Tensor, line: Line) -> Tensor:
        """The loss of the quantities ``values`` [len(names), N] of the rows, with names = line.names."""

    def line_backward(self, names: tuple[str, ...], values: Tensor, grad: Tensor, line: Line) -> Tensor:
        """Gradients of those quantities [len(names), N] from that of the loss."""


class LossBackend(Backend, Protocol):
    """A loss is one call, and its gradients are: where calls take longer than the kernels of few rows."""

    def loss(self, pairs: Pairs, names: tuple[str, ...], line: Line, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and what ``loss_backward`` needs of it, in a form of the backend's own; ``keep`` as for ``forward``."""

    def loss_backward(
        self,
        pairs: Pairs,
        names: tuple[str, ...],
        line: Line,
        kept: Sequence[Tensor],
        grad: Tensor,
        needs: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        """Gradients of rows, columns, bias and scale, each where ``needs`` says so, from that of the loss."""


_LOSS_BACKENDS: dict[str, LossBackend] = {"cuda": cuda, "triton": triton, "cpu": cpu}  # cuda is a LineBackend as well
#: Every backend by name. ``backend="auto"`` tries those of :data:`FASTEST_FIRST`.
BACKENDS: dict[str, LineBackend | LossBackend] = {**_LOSS_BACKENDS, "chunked": chunked, "reference": reference}
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
