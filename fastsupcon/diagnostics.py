"""Figures to watch in contrastive training, beside the loss; none holds the N x N matrix, and none has a gradient.

    figures = diagnose(features, labels)                              # every hundred steps, say; nothing waits for the device
    log({name: float(figure) for name, figure in figures.items()})    # here it is waited for

Features are [N, D], or [B, V, ...] with V views of B samples, as the losses take them; labels are integers [B], and None where the views of
a sample are its only positives. Rows are brought to unit length, so that |x - y|^2 = 2 - 2 x . y; a row of zeros stays zero and counts as
orthogonal to every other. A row is never a pair with itself. Sums are in float32, for float64 features in float64, under autocast too.

A mean over pairs of which there is none is NaN, and no number that would read as a good one: without positives (lone_share is 1 then) the
alignment and the positive similarity, with one class alone the negative similarity, with one row alone the uniformity. NaN or inf in
the features shows in every figure made of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks, operators
from .backends._dtypes import no_autocast
from .losses._frame import class_labels, rows_of
from .options import Backend
from .problem import Pairs
from .rows import wide_rows

__all__ = ["alignment", "contrastive_top1", "diagnose", "lone_share", "similarities", "uniformity"]

BLOCK = 2**24  # similarities held at once: 64 MiB in float32,
LEAST_ROWS = 64  # or those of so many rows, about as much as the features themselves


@torch.no_grad()
def diagnose(features: Tensor, labels: Tensor | None = None, *, t: float = 2.0, backend: Backend = "auto") -> dict[str, Tensor]:
    """All figures of this module by name: one call for what is to be watched.

    Args:
        features: [N, D] or [B, V, ...].
        labels: integer [B] (or [B, 1], or [1, B]), any values. None: the other views of a sample are its positives.
        t: positive, that of ``uniformity``.
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        alignment, uniformity, positive_similarity, negative_similarity, lone_share (of rows, views included) and contrastive_top1: 0-d
        tensors beside the features.

    Raises:
        TypeError, ValueError: as ``alignment`` and ``uniformity``.

    Cost: one forward of a loss and 2 N^2 D flops in plain PyTorch; memory O(N D).
    """
    z, keys = _unit_rows(features, labels)
    positive, negative = _half_distances(z, keys)
    return {
        "alignment": 2 * positive,
        "uniformity": uniformity(features, t, backend=backend),
        "positive_similarity": 1 - positive,
        "negative_similarity": 1 - negative,
        "lone_share": lone_share(keys),
        "contrastive_top1": _top1(z, keys),
    }


@torch.no_grad()
def alignment(features: Tensor, labels: Tensor | None = None) -> Tensor:
    """The mean of |x - y|^2 over the pairs of positives: 0 where all rows of a class are one, 2 where they are orthogonal.

    Wang & Isola 2020, L_align (section 4.1) with alpha = 2. Exact to rounding of itself, however small it is. O(N D) work and memory.

    Args:
        features: [N, D] or [B, V, ...].
        labels: integer [B] (or [B, 1], or [1, B]), any values. None: the other views of a sample are its positives.

    Returns:
        0-d; NaN where no row has a positive.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or there is one view and no labels.
    """
    return 2 * _half_distances(*_unit_rows(features, labels))[0]


@torch.no_grad()
def uniformity(features: Tensor, t: float = 2.0, *, backend: Backend = "auto") -> Tensor:
    """The log of the mean of exp(-t |x - y|^2) over all pairs of rows: 0 where all rows are one, lower the more evenly they are spread.

    Wang & Isola 2020, L_uniform (section 4.1). One forward of the operator: N^2 D flops, O(N D) memory.

    Args:
        features: [N, D] or [B, V, ...], whose views are rows like others.
        t: positive.
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        0-d; NaN for a single row.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    rows, _ = rows_of(features)
    _checks.temperature("t", t)
    t, n = float(t), len(rows)
    log_sums = operators.terms(Pairs(rows, scale=2 * t, unit=True), ("all",), backend=backend)[0][0]
    return log_sums.logsumexp(0) - (math.log(n * (n - 1)) if n > 1 else -math.inf) - 2 * t


@torch.no_grad()
def similarities(features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean cosine x . y of the pairs of positives, and that of all other pairs. O(N D) work and memory.

    ``alignment`` is 2 less twice the first.

    Args:
        features: [N, D] or [B, V, ...].
        labels: integer [B] (or [B, 1], or [1, B]), any values. None: the other views of a sample are its positives.

    Returns:
        0-d each; NaN where there is no such pair.

    Raises:
        TypeError, ValueError: as ``alignment``.
    """
    positive, negative = _half_distances(*_unit_rows(features, labels))
    return 1 - positive, 1 - negative


@torch.no_grad()
def lone_share(labels: Tensor) -> Tensor:
    """The share of labels that no other has: of anchors without a positive, where there is one view (with several, none is lone).

    Args:
        labels: integer [N] (or [N, 1], or [1, N]), any values.

    Returns:
        0-d, float32. O(N log N) work.

    Raises:
        TypeError, ValueError: labels have the wrong type, dtype or shape, or there are none.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor of an integer dtype, got {type(labels).__name__}")
    if labels.numel() == 0:
        raise ValueError(f"labels must not be empty, got shape {list(labels.shape)}")
    _, count = _classes(class_labels(labels, labels.numel(), labels.device))
    return (count == 1).float().mean()


@torch.no_grad()
def contrastive_top1(features: Tensor, labels: Tensor | None = None) -> Tensor:
    """The share of rows whose nearest other row is of their class: the accuracy of one nearest neighbour, each row left out in its turn.

    Of rows that are equally near the first counts, so rows that are all alike score as guessing does. A lone anchor is a miss: 1 -
    lone_share is the most there can be. 2 N^2 D flops in row blocks of plain PyTorch, O(N D) memory.

    Args:
        features: [N, D] or [B, V, ...].
        labels: integer [B] (or [B, 1], or [1, B]), any values. None: the other views of a sample are its positives.

    Returns:
        0-d.

    Raises:
        TypeError, ValueError: as ``alignment``.
    """
    return _top1(*_unit_rows(features, labels))


def _unit_rows(features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of unit length [N, D] in the sum dtype, and their keys [N]: positives have equal ones."""
    rows, views = rows_of(features)
    samples = len(rows) // views
    if labels is not None:
        keys = class_labels(labels, samples, rows.device)
    elif views > 1:
        keys = torch.arange(samples, device=rows.device)
    else:
        raise ValueError(
            f"features hold one view of {samples} samples, and labels are not given: no row can have a positive. Pass labels, or features "
            "[B, V, ...] with V >= 2 views"
        )
    with no_autocast(rows):
        return wide_rows(rows, unit=True), keys.repeat(views)


def _classes(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of each key [N] the number of its class, below N, and how many keys are of that class."""
    keys = keys.contiguous()
    ordered = keys.sort().values
    number = torch.searchsorted(ordered, keys)  # the place of the class's first key
    return number, torch.searchsorted(ordered, keys, right=True) - number


def _half_distances(z: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of |x - y|^2 / 2 = 1 - x . y over the ordered pairs of equal keys, and over those of different ones.

    With m_i and n_i the mean and the size of i's class, and m the mean of all rows, the sums over these pairs are

        sum_i n_i |x_i - m_i|^2        and        sum_i (N - n_i) |x_i - m_i|^2 + N |m_i - m|^2

    in which no term is taken from another: distances of 10^-6 are as exact as those of 1.
    """
    number, count = _classes(keys)
    # the sum of rows by class is the gradient of an embedding: on a GPU the same bits in every run, as index_add is not
    sums = torch.ops.aten.embedding_dense_backward(z, number, len(z), -1, False)
    means = sums[number] / count[:, None]
    within = (z - means).square().sum(1)
    between = (means - z.mean(0)).square().sum(1)
    zero = (z == 0).all(1)  # what a row of zeros lacks of a unit row that is orthogonal to all others: 1/2 in every pair
    others, rest = count - 1, len(z) - count
    return (
        _mean((count * within + others * zero).sum(), others.sum()),
        _mean((rest * (within + zero) + len(z) * between).sum(), rest.sum()),
    )


def _mean(total: Tensor, pairs: Tensor) -> Tensor:
    return torch.where(pairs > 0, total / pairs, torch.nan)


def _top1(z: Tensor, keys: Tensor) -> Tensor:
    size = max(LEAST_ROWS, BLOCK // len(z))
    with no_autocast(z):
        return torch.cat([_hits(z, keys, slice(start, start + size)) for start in range(0, len(z), size)]).mean()


def _hits(z: Tensor, keys: Tensor, rows: slice) -> Tensor:
    similarities = z[rows] @ z.T
    similarities.diagonal(rows.start).fill_(-torch.inf)
    nearest, column = similarities.max(1)
    hit = (keys[column] == keys[rows]) & (nearest > -torch.inf)  # a row alone has no other
    return torch.where(nearest.isnan(), torch.nan, hit.to(z.dtype))
