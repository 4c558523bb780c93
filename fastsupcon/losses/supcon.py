"""Supervised contrastive loss: L_out of Khosla et al. 2020 (eq. 2), the SC loss of Wang et al. 2021; without labels SimCLR's NT-Xent."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, operators
from ..backends import select, sum_dtype
from ..backends._dtypes import no_autocast
from ..positives import mask_positives
from ..problem import Line, Pairs
from ._frame import LONE_ANCHORS, REDUCTIONS, Loss, class_labels, reduce, refuse_lone_anchors, rows_of, wide_temperature


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
        labels: integer [B] (or [B, 1], or [1, B]), any values; whole numbers of a floating dtype are taken too.
        mask: [B, B], entry (b, c) the weight of sample c as a positive of sample b; may be soft and asymmetric. A row is no positive of
            itself, whatever the diagonal says. Not together with ``labels``.
        temperature: tau, a number or a 0-d tensor, which may require grad.
        base_temperature: the loss is multiplied by temperature / base_temperature; None: by 1.
        contrast_mode: "all": every view is an anchor; "one": the first view only. All rows are contrasted with in both.
        normalize: bring the rows to unit length first. Without it the caller's rows are used as they are.
        reduction: "mean" over anchors, "sum", or "none": [N], or [B] with contrast_mode="one".
        lone_anchors: an anchor without a positive contributes "zero" and counts in the mean; is left out of it ("skip"); or is an "error"
            (ValueError; on a GPU this waits for the device).
        backend: see :func:`fastsupcon.functional.self_logsumexp`.

    Returns:
        The loss in float32, for float64 features in float64. Gradients have the dtype of ``features``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value, or no anchor can have a positive (one view,
            neither labels nor mask); the text names it.
    """
    z, views = rows_of(features)
    samples = features.shape[0]
    _check_options(temperature, contrast_mode, base_temperature, reduction, lone_anchors)
    _check_positives(labels, mask, samples, views, z.device)
    anchors = z.shape[0] if contrast_mode == "all" else samples
    temperature = wide_temperature(temperature, z)
    factor = 1.0 if base_temperature is None else temperature / base_temperature
    scale = 1 / temperature
    keys = None
    if mask is None:
        labels = torch.arange(samples, device=z.device) if labels is None else class_labels(labels, samples, z.device)
        keys = labels if views == 1 else labels.repeat(views)
    if contrast_mode == "all":
        pairs = Pairs(z, scale=scale, unit=normalize, row_keys=keys)
    else:
        own_row = torch.arange(anchors, device=z.device)
        pairs = Pairs(z[:anchors], z, scale, normalize, None, None if keys is None else keys[:anchors], keys, own_row)

    if mask is None and lone_anchors != "error" and z.shape[0] > 1:
        learned = isinstance(factor, Tensor)
        line = Line(all=1, similarity=-1, factor=1.0 if learned else float(factor), lone=lone_anchors, reduction=reduction)
        loss = operators.loss(pairs, line, backend=backend)
        return loss * factor if learned else loss
    with no_autocast(z):
        if z.shape[0] == 1:  # nothing to contrast with: the log of an empty sum would be -inf; a zero that still shows a NaN
            if lone_anchors == "error":
                refuse_lone_anchors(torch.zeros(1, dtype=torch.bool, device=z.device))
            select(backend, z.device, z.dtype, z.shape[1])
            losses = (z * 0).sum(1, dtype=sum_dtype(z.dtype))
            return reduce(losses, reduction)
        if mask is None:
            (everything, similarity, count), _ = operators.terms(pairs, ("all", "similarity", "count"), backend=backend)
            positive, paired = similarity / count.clamp_min(1), count > 0
        else:
            ((everything,), _) = operators.terms(pairs, ("all",), backend=backend)
            positive, paired = mask_positives(z, mask, normalize)
            positive, paired = positive[:anchors] * scale, paired[:anchors]
        if lone_anchors == "error":
            refuse_lone_anchors(paired)
        losses = (everything - positive) * paired * factor  # 0 for a lone anchor, but NaN stays NaN
        return reduce(losses, reduction, paired if lone_anchors == "skip" else None)


def _check_positives(labels, mask, samples: int, views: int, device: torch.device) -> None:
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both define the positives: expected at most one, got both")
    if labels is None and mask is None and views == 1:
        raise ValueError(
            f"features hold one view of {samples} samples, and neither labels nor mask is given: no anchor can have a positive, and the "
            "loss could only be 0. Pass labels, a mask, or features [B, V, ...] with V >= 2 views"
        )
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        if list(mask.shape) != [samples, samples]:
            raise ValueError(f"mask must have shape [{samples}, {samples}], got {list(mask.shape)}")
        _checks.on_device("mask", mask, device)


def _check_options(temperature, contrast_mode, base_temperature, reduction, lone_anchors) -> None:
    _checks.temperature("temperature", temperature)
    if base_temperature is not None:
        _checks.temperature("base_temperature", base_temperature)
    _checks.one_of("contrast_mode", contrast_mode, ("all", "one"))
    _checks.one_of("reduction", reduction, REDUCTIONS)
    _checks.one_of("lone_anchors", lone_anchors, LONE_ANCHORS)


class SupConLoss(Loss):
    """:func:`fastsupcon.functional.supcon_loss` with its options held; positional arguments and defaults are those of SupContrast.

    Note ``base_temperature``: the loss is multiplied by temperature / base_temperature. For the loss of the paper set both alike, or None.

    >>> loss = SupConLoss(temperature=0.1, base_temperature=0.1, normalize=True)(features, labels)  # features [B, V, D]
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float | None = 0.07,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        lone_anchors: str = "zero",
        backend: str = "auto",
    ) -> None:
        _check_options(temperature, contrast_mode, base_temperature, reduction, lone_anchors)
        super().__init__(
            temperature=temperature,
            contrast_mode=contrast_mode,
            base_temperature=base_temperature,
            normalize=normalize,
            reduction=reduction,
            lone_anchors=lone_anchors,
            backend=backend,
        )

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return supcon_loss(features, labels, mask, **self.options)
