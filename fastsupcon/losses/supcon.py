"""Supervised contrastive loss of Khosla et al. 2020 in its forms; without labels SimCLR's NT-Xent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from .. import _checks, operators
from ..backends import select, sum_dtype
from ..backends._dtypes import no_autocast
from ..blocks import Block, Quantities, logaddexp, quantities
from ..options import Across, Backend, ContrastMode, Denominator, Form, LoneAnchors, Reduction
from ..positives import listed_positives, mask_positives, shared_label_positives
from ..problem import Line, Pairs
from ..queue import MemoryQueue
from ..ranks import Ranks
from ..rows import wide_number
from ._contrast import Keys, blocks_of, numbers, pairs_of_each, remember, scaled
from ._frame import Loss, class_labels, ranks_of, reduce, refuse_lone_anchors, rows_of, said, weights_of
from ._supcon_arguments import are_several, check_options, check_positives, check_together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    contrast_mode: ContrastMode = "all",
    form: Form = "out",
    denominator: Denominator = "all",
    beta: float = 0.0,
    ignore_index: int | None = None,
    class_weights: Tensor | None = None,
    anchor_weights: Tensor | None = None,
    queue: MemoryQueue | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    lone_anchors: LoneAnchors = "zero",
    group: ProcessGroup | None = None,
    across: Across = "gather",
    backend: Backend = "auto",
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

    Args:
        features: [N, D], or [B, V, ...] with V views of B samples: trailing dimensions are flattened, views become rows view-major
            (N = V B).
        labels: integer [B] (or [B, 1], or [1, B]), any values: -1 too is a class like the others, unless it is the ``ignore_index``. Whole
            numbers of a floating dtype are taken too. Or [B, C] with C > 1, >= 0: of several classes at once, or soft; then row p is a
            positive of row i with weight y_i . y_p.
        mask: [B, B], entry (b, c) >= 0 the weight of sample c as a positive of sample b; may be soft and asymmetric. A row is no positive
            of itself, whatever the diagonal says. An anchor whose weights sum to at most 1e-6 of the largest weight has no positive.
        positives: integer [A, K], for each anchor the numbers of its positives among the columns, -1 for none (KCL, Kang et al. 2021).
            At most one of ``labels``, ``mask`` and ``positives``; the last two and several labels need form="out", denominator="all".
        keys: [M, D], other columns: the anchors meet these, and not each other (MoCo's keys, a reference set). Needs ``positives``, or
            ``labels``, one class a row, with ``key_labels``. Cast to the dtype of ``features``.
        key_labels: integer [M], the classes of ``keys``.
        temperature: tau, a number or a tensor of one element, which may require grad.
        base_temperature: the loss is multiplied by temperature / base_temperature; None: by 1.
        contrast_mode: "all": every view is an anchor; "one": the first view only. All rows are contrasted with in both.
        form: "out": the mean over positives stands outside of the log, or "in": inside.
        denominator: "all" other rows, or the "negatives" alone.
        beta: at least 0, how much more hard negatives weigh.
        ignore_index: rows of this label are no anchors and nobody's positives, but negatives.
        class_weights: floating [C], >= 0, for labels in [0, C): each anchor's loss is weighted by its class's.
        anchor_weights: floating [B] or [A], >= 0: each anchor's loss is weighted. The mean is over the weights.
        queue: a MemoryQueue: its rows are more columns, which no gradient reaches, and positives where their label is the anchor's. In
            training mode it then takes in this batch: its rows, or ``keys`` where they are given.
        normalize: bring the rows to unit length first. Without it the caller's rows are used as they are.
        reduction: "mean" over anchors, "sum", or "none": [N], or [B] with contrast_mode="one".
        lone_anchors: an anchor without a positive (with denominator="negatives": or without a negative) contributes "zero" and counts in
            the mean; is left out of it ("skip"); or is an "error" (ValueError; on a GPU this waits for the device).
        group: the process group whose ranks each call with rows of their own, as many as they have: the loss of all rows together.
            None: this process alone.
        across: how rows of other ranks come: "gather" them all, or a rank's at a time by a "ring", in O(N D / ranks) memory.
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        The loss in float32, for float64 features in float64. Gradients have the dtype of ``features``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value, two of them cannot be used together, or no
            anchor can have a positive (one view, nothing that names positives); the text names it. On a GPU and under torch.compile a
            weight below 0 or a number out of range is asserted by the device: reading it back would wait. With a group, all ranks raise
            where they disagree on an option, on a shape, on what is given or on what requires a gradient.
        RuntimeError: a rank did not come within the group's timeout.

    With a group: labels, weights and views are those of this rank's rows, and a rank may have none (B = 0). Masks and lists of positives,
    which name rows by number, are refused. "mean" and "sum" are over all ranks' anchors and come out the same on every rank, a NaN too;
    "none" is of this rank's. Gradients are for DistributedDataParallel or FSDP to average. A queue takes in all ranks' rows.

    Cost: N^2 D flops forward, as a pair of rows is visited once, and 3 to 4 N^2 D backward; with M other columns 2 N M D and 6 N M D.
    With ``beta`` three times this. Memory O((N + M) D).
    """
    ranks = ranks_of(group, across)
    least = 1 if ranks is None else 0
    z, views = rows_of(features, least=least)
    samples = features.shape[0]
    anchors = samples if contrast_mode == "one" else z.shape[0]
    check_options(temperature, contrast_mode, base_temperature, form, denominator, beta, reduction, lone_anchors, queue)
    check_positives(features, labels, mask, positives, keys, anchors)
    several = labels if are_several(labels, samples) else None
    by_keys = mask is None and positives is None and several is None
    classes = class_labels(labels, samples, z.device) if by_keys and labels is not None else None
    check_together(z, by_keys, classes, positives, form, denominator, beta, keys, key_labels, ignore_index, queue, least)
    weights = weights_of(classes, class_weights, ignore_index, anchor_weights, samples, anchors, z)
    if ranks is not None:
        if mask is not None or positives is not None:
            raise ValueError(f"{'mask' if positives is None else 'positives'} names rows by number: expected group=None, got a group")
        ranks.meet(
            "supcon_loss",
            z.device,
            {"samples": samples, "rows": len(z), "anchors": anchors, "keys": 0 if keys is None else len(keys)},
            views=views,
            depth=z.shape[1],
            dtype=z.dtype,
            requires_grad=z.requires_grad,
            positives="none" if labels is None else "labels" if several is None else f"labels of {several.shape[1]} classes",
            keys=said(keys),
            temperature=said(temperature),
            base_temperature=said(base_temperature),
            form=form,
            denominator=denominator,
            beta=beta,
            ignore_index=ignore_index,
            class_weights=said(class_weights),
            anchor_weights=said(anchor_weights),
            queue=said(queue),
            normalize=normalize,
            reduction=reduction,
            lone_anchors=lone_anchors,
        )
    temperature = wide_number(temperature, z)
    scale, factor = 1 / temperature, 1.0 if base_temperature is None else temperature / wide_number(base_temperature, z)

    of_keys = None
    if by_keys:
        of_samples = numbers(samples, z.device, ranks, "samples") if classes is None else classes
        of_columns = None if keys is None or key_labels is None else class_labels(key_labels, len(keys), z.device, "key_labels")
        of_keys = Keys(of_samples if views == 1 else of_samples.repeat(views), of_columns)
    blocks = blocks_of(z, anchors, of_keys, scale, normalize, keys, queue, ranks)

    if by_keys and denominator == "all" and not beta and weights is None and lone_anchors != "error" and _is_one(blocks, ranks):
        learned = isinstance(factor, Tensor)
        parts = {"similarity": -1.0} if form == "out" else {"equal": -1.0, "log_count": 1.0}
        line = Line(all=1.0, **parts, factor=1.0 if learned else float(factor), lone=lone_anchors, reduction=reduction)
        loss = operators.loss(blocks[0], line, backend=backend)
        loss = loss * factor if learned else loss
    else:
        with no_autocast(z):
            if not blocks:  # nobody to meet: the log of an empty sum would be -inf; a zero that still shows a NaN
                if not torch.compiler.is_compiling():  # which would trace how a backend is found
                    select(backend, z.device, z.dtype, z.shape[1])
                losses, paired = (z * 0).sum(1, dtype=sum_dtype(z.dtype)), torch.zeros(len(z), dtype=torch.bool, device=z.device)
            elif by_keys:
                losses, paired = _by_keys(blocks, form, denominator, beta, backend)
            else:
                everything = quantities(blocks, "all", backend=backend).all
                if positives is not None:
                    positive, paired = listed_positives(z, keys, positives, normalize)
                elif mask is not None:
                    positive, paired = mask_positives(z, mask, normalize)
                elif several is not None:  # one of the three is given
                    positive, paired = shared_label_positives(z, several.repeat(views, 1), normalize, ranks)
                losses, paired = everything - positive[:anchors].to(everything.dtype) * scale, paired[:anchors]
            if lone_anchors == "error":
                needed = "a positive" if denominator == "all" else "a positive and a negative"
                refuse_lone_anchors(paired if weights is None else paired | (weights == 0), needed, ranks)
            losses = losses * paired * factor  # 0 for a lone anchor, but NaN stays NaN
            if lone_anchors == "skip":
                weights = paired if weights is None else weights * paired
            loss = reduce(losses, reduction, weights, ranks)
    if queue is not None and of_keys is not None:  # after all that may be refused, so that a batch that is stays out
        remember(queue, z, of_keys, keys, classes is not None, ranks)
    return loss


def _is_one(blocks: list[Block], ranks: Ranks | None) -> TypeGuard[list[Pairs]]:
    """Whether the loss is that of one block and of this process alone."""
    return len(blocks) == 1 and ranks is None


def _by_keys(blocks: list[Block], form: Form, denominator: Denominator, beta: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """The losses of anchors, finite where the input is, and which of them have a positive and something in the denominator."""
    names = ["count", "similarity" if form == "out" else "equal"]
    if not beta:
        names.append("all" if denominator == "all" else "different")
    elif denominator == "all":
        names.append("equal")
    q = quantities(blocks, *names, backend=backend)
    if not beta:
        log_sum = q.all if denominator == "all" else q.different
    else:
        log_sum = _hard_negatives(blocks, q, beta, backend)
        log_sum = logaddexp(q.equal, log_sum) if denominator == "all" else log_sum
    count = q.count.clamp_min(1)
    positive = q.similarity / count if form == "out" else _finite(q.equal) - count.log()
    return _finite(log_sum) - positive, (q.count > 0) & (log_sum != -torch.inf)


def _hard_negatives(blocks: list[Block], q: Quantities, beta: float, backend: Backend) -> Tensor:
    """log of n times the mean of e^t over the n negatives, each weighted by e^(beta t)."""
    harder, hard = (quantities([scaled(block, by) for block in blocks], "different", backend=backend).different for by in (1 + beta, beta))
    negatives = (pairs_of_each(blocks) - q.count).clamp_min(1)
    return (negatives.log() + _finite(harder) - _finite(hard)).masked_fill(hard == -torch.inf, -torch.inf)


def _finite(log_sum: Tensor) -> Tensor:
    """0 for the log of an empty sum."""
    return log_sum.masked_fill(log_sum == -torch.inf, 0)


class SupConLoss(Loss):
    """``fastsupcon.functional.supcon_loss`` with its options held: its help says what each argument means.

    The names that an option can have are types in ``fastsupcon.options``.

    Positional arguments and defaults are those of SupContrast. Note ``base_temperature``, which is None in the function: the loss is
    multiplied by temperature / base_temperature. For the loss of the paper set both alike, or None.

    A temperature that changes: a number is set anew (``loss.temperature = 0.05``), a tensor, which is a buffer of the module, is written
    to (``loss.temperature.fill_(0.05)``), an nn.Parameter is learned. torch.compile compiles once for any number, at its second one.

    Examples:
        >>> loss = SupConLoss(temperature=0.1, base_temperature=0.1, normalize=True)(features, labels)  # features [B, V, D]
    """

    temperature: float | Tensor
    contrast_mode: ContrastMode
    base_temperature: float | None
    form: Form
    denominator: Denominator
    beta: float
    ignore_index: int | None
    class_weights: Tensor | None
    queue: MemoryQueue | None
    normalize: bool
    reduction: Reduction
    lone_anchors: LoneAnchors
    group: ProcessGroup | None
    across: Across
    backend: Backend

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: ContrastMode = "all",
        base_temperature: float | None = 0.07,
        *,
        form: Form = "out",
        denominator: Denominator = "all",
        beta: float = 0.0,
        ignore_index: int | None = None,
        class_weights: Tensor | None = None,
        queue: MemoryQueue | None = None,
        normalize: bool = False,
        reduction: Reduction = "mean",
        lone_anchors: LoneAnchors = "zero",
        group: ProcessGroup | None = None,
        across: Across = "gather",
        backend: Backend = "auto",
    ) -> None:
        check_options(temperature, contrast_mode, base_temperature, form, denominator, beta, reduction, lone_anchors, queue)
        ranks_of(group, across)
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
            group=group,
            across=across,
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
        """The loss of a batch. At most one of ``labels``, ``mask`` and ``positives`` says who is whose positive; none: the views do.

        Args:
            features: [N, D], or [B, V, ...] of V views.
            labels: integer [N] or [B], any values; or [B, C], several or soft.
            mask: [B, B], >= 0.
            positives: integer [A, K] for A anchors, numbers of columns, -1 for none.
            keys: [M, D], other columns than the rows themselves.
            key_labels: integer [M], theirs.
            anchor_weights: floating [B] or [A], >= 0.

        Returns:
            0-d, or [A] with reduction="none"; float32, for float64 features float64.
        """
        return supcon_loss(
            features,
            labels,
            mask,
            positives=positives,
            keys=keys,
            key_labels=key_labels,
            anchor_weights=anchor_weights,
            **self.options,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def chance_level(self, rows: int) -> float:
        """The loss of ``rows`` rows, V B of V views, whose similarities are all equal: log(rows - 1) times temperature / base_temperature.

        Of both forms, where every anchor has a positive and meets the batch alone. With another ``denominator`` or ``beta`` it depends on
        the labels, with a queue on what is in it: a ValueError.
        """
        _checks.size("rows", rows, least=2)
        if self.denominator != "all" or self.beta or self.queue is not None:
            raise ValueError("chance_level is known for denominator='all', beta=0 and no queue alone: else it depends on the labels")
        factor = 1.0 if self.base_temperature is None else float(self.temperature) / float(self.base_temperature)
        return math.log(rows - 1) * factor
