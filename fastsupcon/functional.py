"""The losses as pure functions. Each reads as its formula; its log-sum-exp runs in a fused kernel that never holds the N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, ops
from .backends import sum_dtype
from .positives import label_positives, mask_positives
from .rows import row_dots, unit_rows


def self_logsumexp(z: Tensor, *, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """log sum over j != i of exp(z_i . z_j * scale).

    Equivalent to::

        logits = z @ z.T * scale
        logits.fill_diagonal_(-torch.inf).logsumexp(1)

    Args:
        z: rows [N, D], any floating dtype.
        scale: 1 / temperature.
        backend: "auto" (the fastest that serves these rows), "cuda", "triton", "cpu", "chunked" or "reference".

    Returns:
        [N] in float32, for float64 rows in float64. With N = 1 there is nothing to sum: -inf, and no gradient.

    Raises:
        TypeError, ValueError: ``z`` is no floating-point [N, D] with N, D >= 1; the backend is unknown or cannot serve it.
    """
    _checks.rows("z", z)
    return _self_lse(z, float(scale), False, backend)


def _self_lse(z: Tensor, scale: float, unit: bool, backend: str) -> Tensor:
    return ops.self_lse(z, scale, unit, backend)


def cross_logsumexp(
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    row_labels: Tensor | None = None,
    column_labels: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """log sum over the columns j allowed for row i of exp(a_i . b_j * scale + bias_j), with gradients for a, b and bias.

    Equivalent, for ``skip``, to::

        logits = a @ b.T * scale + bias
        logits.scatter(1, skip[:, None], -torch.inf).logsumexp(1)

    Args:
        a: rows [N, D].
        b: columns [M, D], of a's dtype and on its device.
        scale: 1 / temperature.
        bias: floating [M], added to the logits.
        skip: int64 [N], one excluded column per row; -1 excludes none.
        row_labels, column_labels: integer [N] and [M]: all columns of the row's own label are excluded. Not together with ``skip``.
        backend: see :func:`self_logsumexp`.

    Returns:
        [N] in float32, for float64 rows in float64. A row that allows no column has -inf and passes no gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; both exclusion rules are given; the backend
            is unknown or cannot serve this. On a GPU ``skip`` out of range is a device-side assertion: reading it back would wait.
    """
    _checks.rows("a", a)
    _checks.rows("b", b, columns=a.shape[1])
    _checks.on_device("b", b, a.device)
    if b.dtype != a.dtype:
        raise TypeError(f"b must have a's dtype {a.dtype}, got {b.dtype}")
    if bias is not None:
        _checks.vector("bias", bias, len(b), a.device, floating=True)
    if skip is not None:
        _checks.vector("skip", skip, len(a), a.device)
        _checks.within("skip", skip, -1, len(b))
    if (row_labels is None) != (column_labels is None):
        missing, given = ("row_labels", "column_labels") if row_labels is None else ("column_labels", "row_labels")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if row_labels is not None:
        if skip is not None:
            raise ValueError("skip and row_labels/column_labels are two exclusion rules: expected at most one, got both")
        _checks.vector("row_labels", row_labels, len(a), a.device)
        _checks.vector("column_labels", column_labels, len(b), a.device)
    return _cross_lse(a, b, bias, skip, row_labels, column_labels, float(scale), backend)


def _cross_lse(a, b, bias, skip, row_labels, column_labels, scale: float, backend: str) -> Tensor:
    bias = None if bias is None else bias.to(sum_dtype(a.dtype))
    skip, row_labels, column_labels = (None if ids is None else ids.long() for ids in (skip, row_labels, column_labels))
    return ops.cross_lse(a, b, bias, skip, row_labels, column_labels, scale, backend)


def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    contrast_mode: str = "all",
    normalize: bool = False,
    reduction: str = "mean",
    lone_anchors: str = "zero",
    backend: str = "auto",
) -> Tensor:
    """Supervised contrastive loss: L_out of Khosla et al. 2020 (eq. 2), the SC loss of Wang et al. 2021.

        L_i = log sum_{k != i} exp(z_i . z_k / tau) - 1 / |P(i)| sum_{p in P(i)} z_i . z_p / tau,    P(i) = {p != i : y_p = y_i}

    With neither ``labels`` nor ``mask`` the positives are the other views of the same sample: SimCLR's NT-Xent. At equal similarities the
    loss is at its chance level log(N - 1), times temperature / base_temperature, N being the number of rows.

    Args:
        features: [N, D], or [B, V, ...] with V views of B samples: trailing dimensions are flattened, views become rows view-major
            (N = V B).
        labels: integer [B] (or [B, 1]), any values.
        mask: [B, B], entry (b, c) the weight of sample c as a positive of sample b; may be soft and asymmetric. Not together with
            ``labels``.
        temperature: tau, a number or a 0-d tensor, which may require grad.
        base_temperature: the loss is multiplied by temperature / base_temperature; None: by 1.
        contrast_mode: "all": every view is an anchor; "one": the first view only. All rows are contrasted with in both.
        normalize: bring the rows to unit length first. Without it the caller's rows are used as they are.
        reduction: "mean" over anchors, "sum", or "none": [N], or [B] with contrast_mode="one".
        lone_anchors: an anchor without a positive contributes "zero" and counts in the mean; is left out of it ("skip"); or is an "error"
            (ValueError; on a GPU this waits for the device).
        backend: see :func:`self_logsumexp`.

    Returns:
        The loss in float32, for float64 features in float64. Gradients have the dtype of ``features``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it.
    """
    _check_supcon(features, labels, mask, contrast_mode, reduction, lone_anchors)
    _checks.temperature("temperature", temperature)
    if base_temperature is not None:
        _checks.temperature("base_temperature", base_temperature)
    with torch.autocast(features.device.type, enabled=False):
        samples = features.shape[0]
        z = features if features.ndim == 2 else features.flatten(2).transpose(0, 1).flatten(0, 1)  # [V B, D], view-major
        views = z.shape[0] // samples
        if normalize:
            z = unit_rows(z)
        scale = 1 / temperature
        learned = isinstance(temperature, Tensor)
        if learned:  # folded into the rows, so that autograd gives its gradient
            z, scale = z * temperature.rsqrt().to(z.dtype), 1.0
        anchors = z.shape[0] if contrast_mode == "all" else samples

        if mask is None:
            labels = torch.arange(samples, device=z.device) if labels is None else labels.reshape(-1)
            z, positive, has_positive = label_positives(z, labels.long().expand(views, -1).flatten())
        else:
            positive, has_positive = mask_positives(z, mask)
        if contrast_mode == "one":
            positive, has_positive = positive[:anchors], has_positive[:anchors]

        if z.shape[0] == 1:  # nothing to contrast with: log of an empty sum would be -inf; a zero that still shows a NaN
            lse = (z * 0).sum(1, dtype=positive.dtype)
        elif contrast_mode == "all":
            lse = _self_lse(z, scale, normalize and not learned, backend)
        else:
            own_row = torch.arange(anchors, device=z.device)
            lse = _cross_lse(z[:anchors], z, None, own_row, None, None, scale, backend)

        losses = torch.sub(lse, positive, alpha=scale) * has_positive  # lse - scale positive; 0 for a lone anchor, but NaN stays NaN
        if base_temperature is not None:
            losses = losses * (temperature / base_temperature)
        return _reduce(losses, has_positive, reduction, lone_anchors)


def _check_supcon(features, labels, mask, contrast_mode, reduction, lone_anchors) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, got {type(features).__name__}")
    if features.ndim < 2:
        raise ValueError(f"features must have shape [N, D] or [B, V, ...], got {list(features.shape)}")
    _checks.rows("features", features if features.ndim == 2 else features.flatten(2).flatten(0, 1))
    samples = features.shape[0]
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both define the positives: expected at most one, got both")
    if labels is not None:
        flat = labels.reshape(-1) if isinstance(labels, Tensor) and labels.shape == (samples, 1) else labels
        _checks.vector("labels", flat, samples, features.device)
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        if list(mask.shape) != [samples, samples]:
            raise ValueError(f"mask must have shape [{samples}, {samples}], got {list(mask.shape)}")
        _checks.on_device("mask", mask, features.device)
    _checks.one_of("contrast_mode", contrast_mode, ("all", "one"))
    _checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    _checks.one_of("lone_anchors", lone_anchors, ("zero", "skip", "error"))


def _reduce(losses: Tensor, has_positive: Tensor | None, reduction: str, lone_anchors: str) -> Tensor:
    if lone_anchors == "error":
        message = "lone_anchors='error': every anchor must have a positive"
        if torch.compiler.is_compiling():
            torch._assert_async(has_positive.all(), message)
        elif not has_positive.all():
            raise ValueError(f"{message}, got {int((~has_positive).sum())} of {len(has_positive)} without one (labels or mask)")
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / has_positive.sum().clamp_min(1) if lone_anchors == "skip" else losses.mean()


def psc_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    prototypes_per_class: int = 1,
    denominator: str = "negatives",
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Prototypical supervised contrastive loss of Wang et al. 2021 (section 3.4): anchors against learned class prototypes.

        L_i = log sum_{c != y_i} exp(z_i . p_c / tau) - z_i . p_{y_i} / tau

    The own prototype is not in the denominator, so the loss can be negative; at equal similarities it is log(C - 1). With M prototypes per
    class (MPSC) all M own ones leave the denominator, and the positive term is their mean weighted by affinity,
    w_im = softmax_m(z_i . p_{y_i m} / tau), the weights taken as constants in the gradient.

    Args:
        features: [N, D].
        labels: integer [N] in [0, C).
        prototypes: [C M, D], class c owning rows c M ... c M + M - 1. Cast to the dtype of ``features``.
        temperature: tau, a number or a 0-d tensor, which may require grad.
        prototypes_per_class: M.
        denominator: "negatives" (the paper's form), or "all": the own prototypes are put back, which for M = 1 is the cross-entropy of
            cosine logits.
        normalize: bring features and prototypes to unit length first.
        reduction: "mean", "sum" or "none".
        backend: see :func:`self_logsumexp`.

    Returns:
        The loss in float32, for float64 features in float64. Gradients have the dtype of their tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it. On a GPU a label out of
            range is a device-side assertion: reading it back would wait.
    """
    _checks.rows("features", features)
    _checks.rows("prototypes", prototypes, columns=features.shape[1])
    _checks.on_device("prototypes", prototypes, features.device)
    _checks.temperature("temperature", temperature)
    _checks.one_of("denominator", denominator, ("negatives", "all"))
    _checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    per_class = prototypes_per_class
    if not isinstance(per_class, int) or per_class < 1 or len(prototypes) % per_class:
        raise ValueError(f"prototypes_per_class must be a positive divisor of the {len(prototypes)} prototypes, got {per_class!r}")
    classes = len(prototypes) // per_class
    if denominator == "negatives" and classes < 2:
        raise ValueError("prototypes must hold at least 2 classes for denominator='negatives', got 1: there is no negative")
    _checks.vector("labels", labels, len(features), features.device)
    _checks.within("labels", labels, 0, classes)

    with torch.autocast(features.device.type, enabled=False):
        z, p, labels = features, prototypes.to(features.dtype), labels.long()
        if normalize:
            z, p = unit_rows(z), unit_rows(p)
        scale = 1 / temperature
        if isinstance(temperature, Tensor):  # folded into the rows, so that autograd gives its gradient
            z, scale = z * scale.to(z.dtype), 1.0

        if per_class == 1:
            z, p, positive = row_dots(z, p, labels, exclusive=True)
        else:  # their mean over the class's own, weighted by affinity
            own = []
            for m in range(per_class):
                z, p, dots = row_dots(z, p, labels * per_class + m, exclusive=True)
                own.append(dots)
            own = torch.stack(own, 1)  # [N, M]
            positive = ((own.detach() * scale).softmax(1) * own).sum(1)

        skip = row_labels = column_labels = None
        if denominator == "negatives" and per_class == 1:
            skip = labels
        elif denominator == "negatives":
            row_labels, column_labels = labels, torch.arange(len(p), device=p.device) // per_class
        lse = _cross_lse(z, p, None, skip, row_labels, column_labels, scale, backend)
        return _reduce(torch.sub(lse, positive, alpha=scale), None, reduction, "zero")  # lse - scale positive
