"""Supervised contrastive loss of Khosla et al. 2020 in its forms; without labels SimCLR's NT-Xent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks, operators
from ..backends import select, sum_dtype
from ..backends._dtypes import no_autocast
from ..blocks import Quantities, logaddexp, quantities
from ..positives import listed_positives, mask_positives, shared_label_positives
from ..problem import Line, Pairs
from ..queue import MemoryQueue
from ._contrast import Keys, blocks_of, pairs_of_each, remember
from ._frame import (
    LONE_ANCHORS,
    REDUCTIONS,
    Loss,
    check_queue,
    class_labels,
    reduce,
    refuse_lone_anchors,
    rows_of,
    weights_of,
    wide_temperature,
)


def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    positives: Tensor | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    contrast_mode: str = "all",
    form: str = "out",
    denominator: str = "all",
    beta: float = 0.0,
    ignore_index: int | None = None,
    class_weights: Tensor | None = None,
    anchor_weights: Tensor | None = None,
    queue: MemoryQueue | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    lone_anchors: str = "zero",
    backend: str = "auto",
) -> Tensor:
    """Supervised contrastive loss: L_out of Khosla et al. 2020 (eq. 2), the SC loss of Wang et al. 2021.

        L_i = log sum_{k != i} exp(z_i . z_k / tau) - 1 / |P(i)| sum_{p in P(i)} z_i . z_p / tau,    P(i) = {p != i : y_p = y_i}

    With neither ``labels`` nor another way to name positives, they are the other views of the same sample: SimCLR's NT-Xent. At equal
    similarities the loss is at its chance level log(N - 1), times temperature / base_temperature, N being the number of rows.

    Forms, with D_i(s) = log sum over the rows k of other classes, n_i in number, of exp(s z_i . z_k / tau):

        form="in"                 the mean over P(i) stands inside of the log (Khosla et al., eq. 3)
        denominator="negatives"   the sum over k is D_i(1): positives leave it (decoupled; Yeh et al. 2022, eq. 6)
        beta > 0                  D_i(1) becomes log n_i + D_i(1 + beta) - D_i(beta): hard negatives weigh more (Robinson et al. 2021,
                                  eq. 4, with tau+ = 0)

    Cost, with M columns: 2 N M D flops forward (half of it where the rows meet themselves), 4 to 6 N M D backward, O((N + M) D) memory;
    with ``beta`` three times this.

    Args:
        features: [N, D], or [B, V, ...] with V views of B samples: trailing dimensions are flattened, views become rows view-major
            (N = V B).
        labels: integer [B] (or [B, 1], or [1, B]), any values; whole numbers of a floating dtype are taken too. Or [B, C] with C > 1, >= 0:
            of several classes at once, or soft; then row p is a positive of row i with weight y_i . y_p.
        mask: [B, B], entry (b, c) >= 0 the weight of sample c as a positive of sample b; may be soft and asymmetric. A row is no positive
            of itself, whatever the diagonal says.
        positives: integer [A, K], for each anchor the numbers of its positives among the N rows, -1 for none (KCL, Kang et al. 2021).
            At most one of ``labels``, ``mask`` and ``positives``; the last two and several labels need form="out", denominator="all".
        keys: [M, D], other columns: the anchors meet these, and not each other (MoCo's keys, a reference set). Needs labels.
        key_labels: integer [M].
        temperature: tau, a number or a tensor of one element, which may require grad.
        base_temperature: the loss is multiplied by temperature / base_temperature; None: by 1.
        contrast_mode: "all": every view is an anchor; "one": the first view only. All rows are contrasted with in both.
        form: "out" or "in". ``denominator``: "all" or "negatives". ``beta``: >= 0.
        ignore_index: rows of this label are no anchors and nobody's positives, but negatives.
        class_weights: floating [C], for labels in [0, C): each anchor's loss is weighted by its class's.
        anchor_weights: floating [B] or [A]: each anchor's loss is weighted. The mean is over the weights.
        queue: a MemoryQueue: its rows are more columns, which no gradient reaches, and positives where their label is the anchor's. In
            training mode it then takes in this batch: its rows, or ``keys`` where they are given.
        normalize: bring the rows to unit length first. Without it the caller's rows are used as they are.
        reduction: "mean" over anchors, "sum", or "none": [N], or [B] with contrast_mode="one".
        lone_anchors: an anchor without a positive (with denominator="negatives": or without a negative) contributes "zero" and counts in
            the mean; is left out of it ("skip"); or is an "error" (ValueError; on a GPU this waits for the device).
        backend: see :func:`fastsupcon.functional.self_logsumexp`.

    Returns:
        The loss in float32, for float64 features in float64. Gradients have the dtype of ``features``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value, two of them cannot be used together, or no
            anchor can have a positive (one view, nothing that names positives); the text names it. On a GPU and under torch.compile a
            weight below 0 or a number out of range is asserted by the device: reading it back would wait.
    """
    z, views = rows_of(features)
    samples = features.shape[0]
    anchors = samples if contrast_mode == "one" else z.shape[0]
    _check_options(temperature, contrast_mode, base_temperature, form, denominator, beta, reduction, lone_anchors, queue)
    _check_positives(features, labels, mask, positives, keys, anchors)
    temperature = wide_temperature(temperature, z)
    scale, factor = 1 / temperature, 1.0 if base_temperature is None else temperature / wide_temperature(base_temperature, z)
    by_keys = mask is None and positives is None and not _are_several(labels, samples)
    classes = class_labels(labels, samples, z.device) if by_keys and labels is not None else None
    _check_together(z, by_keys, classes, form, denominator, beta, keys, key_labels, ignore_index, queue)
    weights = weights_of(classes, class_weights, anchor_weights, samples, anchors, z)
    if class_weights is not None:
        _checks.within(
            "labels", classes if ignore_index is None else classes.masked_fill(classes == ignore_index, 0), 0, len(class_weights)
        )

    names = None
    if by_keys:
        of_samples = torch.arange(samples, device=z.device) if classes is None else classes
        names = Keys(
            of_samples if views == 1 else of_samples.repeat(views),
            None if keys is None else class_labels(key_labels, len(keys), z.device, "key_labels"),
        )
    if ignore_index is not None:  # such rows are positives of each other alone, and as anchors weigh nothing
        is_anchor = (names.rows[:anchors] != ignore_index).to(sum_dtype(z.dtype))
        weights = is_anchor if weights is None else weights * is_anchor
    blocks = blocks_of(z, anchors, names, scale, normalize, keys, queue)

    if by_keys and denominator == "all" and not beta and weights is None and lone_anchors != "error" and len(blocks) == 1:
        learned = isinstance(factor, Tensor)
        parts = {"similarity": -1.0} if form == "out" else {"equal": -1.0, "log_count": 1.0}
        line = Line(all=1.0, **parts, factor=1.0 if learned else float(factor), lone=lone_anchors, reduction=reduction)
        loss = operators.loss(blocks[0], line, backend=backend)
        loss = loss * factor if learned else loss
    else:
        with no_autocast(z):
            if not blocks:  # nobody to meet: the log of an empty sum would be -inf; a zero that still shows a NaN
                select(backend, z.device, z.dtype, z.shape[1])
                losses, paired = (z * 0).sum(1, dtype=sum_dtype(z.dtype)), torch.zeros(1, dtype=torch.bool, device=z.device)
            elif by_keys:
                losses, paired = _by_keys(blocks, form, denominator, beta, backend)
            else:
                if positives is not None:
                    positive, paired = listed_positives(z, positives, normalize)
                elif mask is not None:
                    positive, paired = mask_positives(z, mask, normalize)
                else:
                    positive, paired = shared_label_positives(z, labels.repeat(views, 1), normalize)
                everything = quantities(blocks, "all", backend=backend).all
                losses, paired = everything - positive[:anchors].to(everything.dtype) * scale, paired[:anchors]
            if lone_anchors == "error":
                needed = "a positive" if denominator == "all" else "a positive and a negative"
                refuse_lone_anchors(paired if ignore_index is None else paired | (is_anchor == 0), needed)
            losses = losses * paired * factor  # 0 for a lone anchor, but NaN stays NaN
            if lone_anchors == "skip":
                weights = paired if weights is None else weights * paired
            loss = reduce(losses, reduction, weights)
    if queue is not None:  # after all that may be refused, so that a batch that is stays out
        remember(queue, z, names, keys, named=classes is not None)
    return loss


def _by_keys(blocks: list[Pairs], form: str, denominator: str, beta: float, backend: str) -> tuple[Tensor, Tensor]:
    """The losses of anchors, finite where the input is, and which of them have a positive and something in the denominator."""
    names = ["count", "similarity" if form == "out" else "equal"]
    names += ["equal" if beta and denominator == "all" else "count" if beta else "all" if denominator == "all" else "different"]
    q = quantities(blocks, *names, backend=backend)
    log_sum = _hard_negatives(blocks, q, beta, backend) if beta else q.all if denominator == "all" else q.different
    if beta and denominator == "all":
        log_sum = logaddexp(q.equal, log_sum)
    count = q.count.clamp_min(1)
    positive = q.similarity / count if form == "out" else _finite(q.equal) - count.log()
    return _finite(log_sum) - positive, (q.count > 0) & (log_sum != -torch.inf)


def _hard_negatives(blocks: list[Pairs], q: Quantities, beta: float, backend: str) -> Tensor:
    """log of n times the mean of e^t over the n negatives, each weighted by e^(beta t)."""
    harder, hard = (
        quantities([block._replace(scale=block.scale * by) for block in blocks], "different", backend=backend).different
        for by in (1 + beta, beta)
    )
    negatives = (pairs_of_each(blocks) - q.count).clamp_min(1)
    return (negatives.log() + _finite(harder) - _finite(hard)).masked_fill(hard == -torch.inf, -torch.inf)


def _finite(log_sum: Tensor) -> Tensor:
    """0 for the log of an empty sum."""
    return log_sum.masked_fill(log_sum == -torch.inf, 0)


def _are_several(labels: object, samples: int) -> bool:
    """Whether labels are [B, C], C > 1: a row of classes for each sample, and not one class each in a row or a column."""
    return isinstance(labels, Tensor) and labels.ndim == 2 and tuple(labels.shape) not in ((samples, 1), (1, samples))


def _check_positives(features: Tensor, labels, mask, positives, keys, anchors: int) -> None:
    samples, device = features.shape[0], features.device
    given = [name for name, value in (("labels", labels), ("mask", mask), ("positives", positives)) if value is not None]
    if isinstance(labels, Tensor) and labels.shape == features.shape and labels.is_floating_point() and mask is not None:
        raise ValueError(
            "labels look like a second view of the features: pass both views as one, torch.stack([z1, z2], dim=1), then labels"
        )
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} {'both' if len(given) == 2 else 'all'} define the positives: expected at most one, got "
            f"{'both' if len(given) == 2 else 'all three'}"
        )
    if not given and (features.ndim == 2 or features.shape[1] == 1) and keys is None:
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
        _checks.not_negative("mask", mask)
    if positives is not None:
        if not isinstance(positives, Tensor) or positives.is_floating_point() or positives.is_complex() or positives.dtype == torch.bool:
            raise TypeError(
                f"positives must be a torch.Tensor of an integer dtype, got {getattr(positives, 'dtype', type(positives).__name__)}"
            )
        if positives.ndim != 2 or positives.shape[0] != anchors:
            raise ValueError(f"positives must have shape [{anchors}, K], got {list(positives.shape)}")
        _checks.on_device("positives", positives, device)
        if positives.numel():
            _checks.within("positives", positives, -1, samples * (1 if features.ndim == 2 else features.shape[1]))
    if _are_several(labels, samples):
        if labels.shape[0] != samples:
            raise ValueError(f"labels must have shape [{samples}] or [{samples}, C], got {list(labels.shape)}")
        _checks.on_device("labels", labels, device)
        _checks.not_negative("labels", labels)


def _check_together(z, by_keys, classes, form, denominator, beta, keys, key_labels, ignore_index, queue) -> None:
    if not by_keys:
        for name, is_given in (
            (f"form={form!r}", form != "out"),
            (f"denominator={denominator!r}", denominator != "all"),
            ("beta", beta != 0),
            ("queue", queue is not None),
        ):
            if is_given:
                raise ValueError(
                    f"{name} needs positives that one class a row names (labels), or views: not a mask, lists or several labels"
                )
    for name, value in (("keys", keys), ("ignore_index", ignore_index)):
        if value is not None and classes is None:
            raise ValueError(f"{name} needs labels, one class a row, and got none")
    if keys is not None:
        _checks.rows("keys", keys, columns=z.shape[1])
        _checks.on_device("keys", keys, z.device)
    if (keys is None) != (key_labels is None):
        missing, given = ("key_labels", "keys") if key_labels is None else ("keys", "key_labels")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if ignore_index is not None and not _checks.is_integer(ignore_index):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def _check_options(temperature, contrast_mode, base_temperature, form, denominator, beta, reduction, lone_anchors, queue) -> None:
    _checks.temperature("temperature", temperature)
    if base_temperature is not None:
        _checks.temperature("base_temperature", base_temperature)
    _checks.one_of("contrast_mode", contrast_mode, ("all", "one"))
    _checks.one_of("form", form, ("out", "in"))
    _checks.one_of("denominator", denominator, ("all", "negatives"))
    _checks.one_of("reduction", reduction, REDUCTIONS)
    _checks.one_of("lone_anchors", lone_anchors, LONE_ANCHORS)
    check_queue(queue)
    _checks.number("beta", beta, 0, math.inf)


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
        form: str = "out",
        denominator: str = "all",
        beta: float = 0.0,
        ignore_index: int | None = None,
        class_weights: Tensor | None = None,
        queue: MemoryQueue | None = None,
        normalize: bool = False,
        reduction: str = "mean",
        lone_anchors: str = "zero",
        backend: str = "auto",
    ) -> None:
        _check_options(temperature, contrast_mode, base_temperature, form, denominator, beta, reduction, lone_anchors, queue)
        super().__init__(
            temperature=temperature,
            contrast_mode=contrast_mode,
            base_temperature=base_temperature,
            form=form,
            denominator=denominator,
            beta=beta,
            ignore_index=ignore_index,
            class_weights=class_weights,
            queue=queue,
            normalize=normalize,
            reduction=reduction,
            lone_anchors=lone_anchors,
            backend=backend,
        )

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        positives: Tensor | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        anchor_weights: Tensor | None = None,
    ) -> Tensor:
        given = {"positives": positives, "keys": keys, "key_labels": key_labels, "anchor_weights": anchor_weights}
        return supcon_loss(features, labels, mask, **given, **self.options)

    def chance_level(self, rows: int) -> float:
        """The loss of ``rows`` rows, V B of V views, whose similarities are all equal: log(rows - 1) times temperature / base_temperature.

        Of both forms, where every anchor has a positive and meets the batch alone. With another ``denominator`` or ``beta`` it depends on
        the labels, with a queue on what is in it: a ValueError.
        """
        if self.denominator != "all" or self.beta or self.queue is not None:
            raise ValueError("chance_level is known for denominator='all', beta=0 and no queue alone: else it depends on the labels")
        factor = 1.0 if self.base_temperature is None else float(self.temperature) / float(self.base_temperature)
        return math.log(rows - 1) * factor
