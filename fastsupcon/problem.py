"""One problem and one loss, as plain values that every layer hands on: the Python side of csrc/problem.h.

Rows a [N, D] (anchors) meet columns b [M, D]; without columns the rows meet themselves (the self shape). With x^ = x / |x| where ``unit``
asks for it, else x:

    s_ij = scale * a^_i . b^_j          t_ij = s_ij + bias_j

A row is never a pair with itself: in the self shape the diagonal is no pair, elsewhere column ``own_column[i]`` is none of row i. Keys
split the pairs into *equal* ones (the row's key is the column's) and *different* ones; without keys all pairs are different.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

#: What can be asked of a row i, and in a cross shape of a column (the same sums, over i):
#:   all, different, equal   log sum_j exp(t_ij) over all pairs, those of different keys, those of equal keys; -inf without one
#:   similarity              sum of s_ij over the pairs of equal keys
#:   count                   how many those are
QUANTITIES = ("all", "different", "equal", "similarity", "count")
LOG_SUMS = QUANTITIES[:3]


class Pairs(NamedTuple):
    """Tensors on one device; keys and own_column are int64; bias and a scale that is a tensor have the sum dtype (backends/_dtypes.py)."""

    rows: Tensor  # [N, D]
    columns: Tensor | None = None  # [M, D] of the rows' dtype; None: the self shape
    scale: float | Tensor = 1.0  # 1 / temperature: a number, or a 0-d tensor whose value is read on the device
    unit: bool = False  # rows and columns are brought to unit length; a row of zeros stays as it is
    bias: Tensor | None = None  # [M]
    row_keys: Tensor | None = None  # [N]
    column_keys: Tensor | None = None  # [M]; None in the self shape, where the rows' keys serve
    own_column: Tensor | None = None  # [N], -1 for none; None in the self shape

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, M, D."""
        n, depth = self.rows.shape
        return n, n if self.columns is None else self.columns.shape[0], depth

    @property
    def norms_size(self) -> int:
        """How many norms a forward keeps for its backward: :class:`Terms` says which."""
        n, m, _ = self.shape
        return (n if self.columns is None else n + m) if self.unit else 1


class Side(NamedTuple):
    """Quantities of the rows, or of the columns, and the incoming gradients of them. The row of ``count`` in ``grads`` is ignored.

    They need not come from the same problem: a row block of a larger one takes its columns' log-sums and gradients from the whole.
    """

    names: tuple[str, ...]  # in the order of QUANTITIES
    values: Tensor  # [len(names), N or M], sum dtype
    grads: Tensor  # the same


class Terms(NamedTuple):
    """What a forward returns."""

    rows: Tensor  # [quantities asked of the rows, N], sum dtype
    columns: Tensor  # [quantities asked of the columns, M]
    norms: Tensor  # for the backward, sum dtype: of unit rows in a form of the backend's own, [N], cross [N + M]; of others [1], whether
    # the kernels found that exponentials need no shift: 1 or 0, which also stands where they do not ask
    kept: Tensor  # for the backward: exponentials that need not be recomputed, [kept_size], sum dtype; [0] where none are


class Gradients(NamedTuple):
    """What a backward returns; None where it was not asked for."""

    rows: Tensor | None
    columns: Tensor | None
    bias: Tensor | None
    scale: Tensor | None  # 0-d, sum dtype


class Line(NamedTuple):
    """A loss that is linear in the quantities of its row.

        loss_i = factor * (all * all_i + different * different_i + equal * equal_i
                           + similarity * similarity_i / count_i + log_count * log count_i)

    Over rows that have a pair of equal keys; any other ("lone") row contributes 0 and counts in the mean (lone="zero"), leaves the mean
    (lone="skip"), or is NaN, as is its gradient (lone="nan", where only a wrong key could make it lone). What is not finite
    because the input is not stays so.
    """

    all: float = 0.0
    different: float = 0.0
    equal: float = 0.0
    similarity: float = 0.0
    log_count: float = 0.0
    factor: float = 1.0
    lone: str = "zero"  # or "skip", "nan"
    reduction: str = "mean"  # or "sum", "none"

    @property
    def names(self) -> tuple[str, ...]:
        """The quantities that it needs: those with a coefficient, and count."""
        return _kept_names(self)


def names_of(line: Line) -> tuple[str, ...]:
    """Line.names, for what torch.compile sees: it warns of caches, and that of torch 2.6 knows no properties of a NamedTuple."""
    return tuple(name for name in QUANTITIES if name == "count" or getattr(line, name))


_kept_names = functools.lru_cache(maxsize=256)(names_of)  # not for ever: a temperature that changes changes the factor
