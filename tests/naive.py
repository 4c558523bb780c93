"""The losses as the textbook writes them: the whole N x N (N x C) matrix in plain PyTorch, differentiated by plain autograd.

In float64 this is the tests' reference. In float32 it is the benchmark's baseline: it follows the published SupContrast code step by step
(mask, similarities, row maximum, log-probabilities, mean over the positives) in as many passes over the matrix, and departs from it in one
point: the self pair leaves the matrix before the row maximum is taken, so that ordinary inputs give no NaN.

It shares no code with fastsupcon, and must not: the two could be wrong alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Rows of x [N, D] over their norm; rows of zeros stay zero."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def reduce(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """``counted`` [N]: which of the losses [N] the mean is over."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp_min(1)


def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor,
    base_temperature: float | None = None,
    contrast_mode: str = "all",
    normalize: bool = False,
    reduction: str = "mean",
    lone_anchors: str = "zero",
) -> Tensor:
    """-1/|P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_{k != i} exp(s_ik) ), s = z z^T / temperature; features [N, D] or [B, V, ...]."""
    samples = features.shape[0]
    views = torch.unbind(features.flatten(2), dim=1) if features.ndim > 2 else [features]
    z = torch.cat(views)  # [V B, D], view-major
    if normalize:
        z = unit(z)
    anchors = z if contrast_mode == "all" else z[:samples]
    if mask is None:
        labels = torch.arange(samples, device=z.device) if labels is None else labels.reshape(-1)
        mask = labels[:, None] == labels[None, :]
    itself = torch.eye(len(anchors), len(z), dtype=torch.bool, device=z.device)
    positives = mask.to(z.dtype).repeat(len(anchors) // samples, len(views)).masked_fill(itself, 0)  # [anchors, V B]
    count = positives.sum(1)
    lone = count.abs() < 1e-6
    if lone_anchors == "error" and lone.any():
        raise ValueError("anchors without a positive")
    if len(z) == 1:  # no other row, so an empty sum
        losses = (z * 0).sum(1)
    else:
        similarities = anchors @ z.T / temperature
        row_max = similarities.detach().masked_fill(itself, -torch.inf).amax(1, keepdim=True)
        logits = similarities - row_max
        exps = logits.masked_fill(itself, -torch.inf).exp()
        log_probabilities = logits - exps.sum(1, keepdim=True).log()
        losses = -(positives * log_probabilities).sum(1) / torch.where(lone, 1, count)
        losses = losses * ~lone
    if base_temperature is not None:
        losses = losses * (temperature / base_temperature)
    return reduce(losses, ~lone if lone_anchors == "skip" else torch.ones_like(lone), reduction)


def psc_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor,
    denominator: str = "negatives",
    normalize: bool = True,
    reduction: str = "mean",
    prototypes_per_class: int = 1,
) -> Tensor:
    """-log( exp(s_{i,y_i}) / sum_{c != y_i} exp(s_ic) ), s = z p^T / temperature, prototypes [C M, D], M of each class side by side.

    With M > 1 all own prototypes leave the denominator, and the numerator's similarity is their mean under w = softmax(s_own), w constant.
    """
    z, p = features, prototypes.to(features.dtype)
    if normalize:
        z, p = unit(z), unit(p)
    similarities = z @ p.T / temperature
    own_columns = labels[:, None] * prototypes_per_class + torch.arange(prototypes_per_class, device=z.device)  # [N, M]
    own = similarities.gather(1, own_columns)
    positive = (own.detach().softmax(1) * own).sum(1)
    allowed = similarities if denominator == "all" else similarities.scatter(1, own_columns, -torch.inf)
    losses = allowed.logsumexp(1) - positive
    return reduce(losses, torch.ones_like(labels, dtype=torch.bool), reduction)


def prototype_cross_entropy(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor,
    class_counts: Tensor | None = None,
    margin: float = 0.0,
    angular_margin: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """F.cross_entropy of cosines / temperature + log prior, the own cosine being cos(arccos + angular_margin) - margin."""
    z, p = features, prototypes.to(features.dtype)
    if normalize:
        z, p = unit(z), unit(p)
    cosines = z @ p.T
    if margin or angular_margin:
        column = labels.clamp_min(0)[:, None]
        own = cosines.gather(1, column)
        if angular_margin:
            angle = own.arccos() + angular_margin
            own = torch.where(angle > torch.pi, own - angular_margin * math.sin(angular_margin), angle.cos())
        cosines = cosines.scatter(1, column, own - margin)
    logits = cosines / temperature
    if class_counts is not None:
        share = class_counts.to(logits.dtype) / class_counts.sum()
        logits = logits + torch.where(share == 0, 1e-9, share).log()
    return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction, ignore_index=ignore_index)


def balanced_supcon_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """log of the sum over classes of mean exp(s), less the mean s of the own class; the means over members but for the anchor."""
    views = torch.unbind(features.flatten(2), dim=1) if features.ndim > 2 else [features]
    z, p = torch.cat(views), prototypes.to(features.dtype)
    if normalize:
        z, p = unit(z), unit(p)
    count, classes = len(z), torch.arange(len(p), device=z.device)
    members = torch.cat([labels.repeat(len(views)), classes])[:, None] == classes  # [N + C, C]
    similarities = z @ torch.cat([z, p]).T / temperature
    itself = torch.eye(count, count + len(p), dtype=torch.bool, device=z.device)
    sizes = members.sum(0) - members[:count].to(z.dtype)  # [N, C]; the anchor is missing from its own class
    row_max = similarities.detach().masked_fill(itself, -torch.inf).amax(1, keepdim=True)
    means = (similarities - row_max).masked_fill(itself, -torch.inf).exp() @ members.to(z.dtype) / sizes
    own = (similarities.masked_fill(itself, 0) @ members.to(z.dtype) / sizes)[members[:count]]
    losses = means.sum(1).log() + row_max[:, 0] - own
    return reduce(losses, torch.ones_like(losses), reduction)


def paco_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    momentum_features: Tensor | None = None,
    class_features: Tensor | None = None,
    *,
    temperature: float | Tensor,
    alpha: float = 0.05,
    beta: float = 1.0,
    gamma: float = 1.0,
    class_counts: Tensor | None = None,
    label_smoothing: float = 0.0,
    class_temperature: float | Tensor = 1.0,
    normalize: bool = True,
    queue: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy, over all classes and rows in one softmax, with a weighted mean of positives; rows weigh gamma in its denominator."""

    def rows(x: Tensor) -> Tensor:
        return x if x.ndim == 2 else torch.cat(torch.unbind(x.flatten(2), dim=1))

    anchors, queue_rows, queue_labels = rows(features), *(queue or (features[:0].reshape(0, rows(features).shape[1]), labels[:0]))
    momentum = queue_rows[:0] if momentum_features is None else rows(momentum_features).to(anchors.dtype)
    x = anchors if class_features is None else rows(class_features).to(anchors.dtype)
    contrasted = torch.cat([anchors, momentum, queue_rows.to(anchors.dtype)])
    count, views, more_views = len(anchors), len(anchors) // len(labels), len(momentum) // len(labels)
    keys = torch.cat([labels.repeat(views + more_views), queue_labels])
    if normalize:
        contrasted = unit(contrasted)
    itself = torch.eye(count, len(contrasted), dtype=torch.bool, device=anchors.device)
    similarities = contrasted[:count] @ contrasted.T / temperature
    logits = x @ prototypes.to(x.dtype).T
    if class_counts is not None:
        share = class_counts.to(logits.dtype) / class_counts.sum()
        logits = logits + torch.where(share == 0, 1e-9, share).log()
    logits = logits / class_temperature
    log_weights = torch.full_like(similarities, gamma).log().masked_fill(itself, -torch.inf)
    log_sum = torch.cat([logits, similarities + log_weights], 1).logsumexp(1)
    one_hot = torch.nn.functional.one_hot(keys[:count], len(prototypes)).to(logits.dtype)
    targets = beta * ((1 - label_smoothing) * one_hot + label_smoothing * (1 - one_hot) / max(1, len(prototypes) - 1))
    positives = alpha * (keys[:count, None] == keys).to(logits.dtype).masked_fill(itself, 0)
    positive = (targets * logits).sum(1) + (positives * similarities).sum(1)
    losses = log_sum - positive / (targets.sum(1) + positives.sum(1))
    return reduce(losses, torch.ones_like(losses), reduction)


def hard_negative_supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor,
    form: str = "out",
    denominator: str = "all",
    beta: float = 0.0,
    ignore_index: int | None = None,
    class_weights: Tensor | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    lone_anchors: str = "zero",
) -> Tensor:
    """supcon_loss anchor by anchor, in its other forms, with sums written out: features [N, D], labels [N]; ``memory``: more columns."""
    rest = lambda x: unit(x) if normalize else x  # noqa: E731
    z = rest(features)
    columns, of_columns = (z, labels) if keys is None else (rest(keys), key_labels)
    if memory is not None:
        columns, of_columns = torch.cat([columns, rest(memory[0])]), torch.cat([of_columns, memory[1]])
    losses, counted, weights = [], [], []
    for i in range(len(z)):
        others = torch.ones(len(columns), dtype=torch.bool, device=z.device)
        if keys is None:
            others[i] = False
        is_anchor = ignore_index is None or labels[i] != ignore_index
        positive = others & (of_columns == labels[i]) & is_anchor
        negative = others & ~positive
        t = columns @ z[i] / temperature
        hard, kept = t[negative], t[positive]
        if beta and len(hard):
            hard = hard + math.log(len(hard)) + (beta * hard).log_softmax(0)
        has_both = bool(positive.any()) and (denominator == "all" or bool(negative.any()))
        if not has_both:
            losses.append(0 * z[i].sum())
        else:
            below = (torch.cat([hard, kept]) if denominator == "all" else hard).logsumexp(0)
            above = kept.mean() if form == "out" else kept.logsumexp(0) - math.log(len(kept))
            losses.append(below - above)
        counted.append(is_anchor and (has_both or lone_anchors == "zero"))
        weights.append(1.0 if class_weights is None or not is_anchor else class_weights[labels[i]])
    weight = torch.stack([torch.as_tensor(w, dtype=z.dtype, device=z.device) * c for w, c in zip(weights, counted, strict=True)])
    losses = torch.stack(losses) * weight
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / weight.sum().clamp_min(1e-300)


def several_labels(labels: Tensor) -> Tensor:
    """The mask [B, B] of labels [B, C]: how many classes two samples share, or how much of them."""
    return labels @ labels.T


def listed(positives: Tensor, rows: int) -> Tensor:
    """The mask [A, N] of lists [A, K] of row numbers, -1 for none."""
    mask = torch.zeros(len(positives), rows, dtype=torch.float64, device=positives.device)
    for anchor, of_anchor in enumerate(positives.tolist()):
        for row in of_anchor:
            if row not in (-1, anchor):
                mask[anchor, row] += 1
    return mask


def info_nce_loss(
    a: Tensor,
    b: Tensor,
    keys: Tensor | None = None,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor,
    symmetric: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of each row of the logits a b^T / temperature against its positives, uniformly weighted; and of each column."""
    if normalize:
        a, b = unit(a), unit(b)
    keys = torch.arange(len(a), device=a.device) if keys is None else keys
    positives = (keys[:, None] == keys[None, :]).to(a.dtype)  # [N, N]
    logits = (a @ b.T) / temperature
    wide, targets = logits, positives
    if negatives is not None:
        further = (a @ (unit(negatives) if normalize else negatives).T) / temperature
        wide, targets = torch.cat([logits, further], 1), torch.cat([positives, torch.zeros_like(further)], 1)
    losses = _soft_cross_entropy(wide, targets)
    if symmetric:
        losses = (losses + _soft_cross_entropy(logits.T, positives.T)) / 2
    return reduce(losses, torch.ones_like(keys, dtype=torch.bool), reduction)


def nt_xent_loss(z0: Tensor, z1: Tensor, *, temperature: float | Tensor, normalize: bool = True, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each of the 2 B rows' logits against its other view, B rows away; the row itself is no candidate."""
    z = torch.cat([z0, z1])
    z = unit(z) if normalize else z
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    losses = torch.nn.functional.cross_entropy(logits, itself.long().argmax(1).roll(len(z0)), reduction="none")
    return reduce(losses, torch.ones(len(z), dtype=torch.bool, device=z.device), reduction)


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets / targets.sum(1, keepdim=True) * torch.log_softmax(logits, 1)).sum(1)
