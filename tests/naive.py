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
