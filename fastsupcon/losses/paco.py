"""Parametric contrastive loss: PaCo (Cui et al. 2021) and GPaCo (Cui et al. 2023), SCL and a classifier in one softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from ..backends._dtypes import no_autocast
from ..blocks import logaddexp, quantities
from ..options import Across, Backend, Reduction
from ..problem import Pairs
from ..queue import MemoryQueue
from ..rows import wide_number, wide_rows
from ._contrast import put, queue_block, shared
from ._frame import check_options, class_labels, ranks_of, reduce, rows_of, said
from ._prototypes import PrototypeLoss, check_prototypes, log_prior, meet_with_prototypes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def paco_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    momentum_features: Tensor | None = None,
    class_features: Tensor | None = None,
    *,
    alpha: float = 0.05,
    beta: float = 1.0,
    gamma: float = 1.0,
    class_counts: Tensor | None = None,
    label_smoothing: float = 0.0,
    temperature: float | Tensor = 0.2,
    class_temperature: float | Tensor = 1.0,
    normalize: bool = True,
    queue: MemoryQueue | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    across: Across = "gather",
    backend: Backend = "auto",
) -> Tensor:
    """Parametric contrastive loss of Cui et al. (PaCo, ICCV 2021; GPaCo, TPAMI 2023): learned class prototypes among the contrasted rows.

        L_i = log( sum_c e^{l_ic} + gamma sum_{k != i} e^{s_ik} )
              - ( beta sum_c q_ic l_ic + alpha sum_{p in P(i)} s_ip ) / ( beta + alpha |P(i)| )
        s_ik = z_i . z_k / tau,    l_ic = (x_i . p_c + log pi_c) / tau_c

    z are the features; k runs over the batch, the momentum encoder's rows and the queue, and P(i) are those of i's class. x are the class
    features, pi the classes' shares of the samples, q_i is one-hot, or smoothed. The own prototype is always a positive, so no anchor is
    lone. PaCo has one view as anchors, and the momentum encoder's rows of the other; GPaCo has no momentum encoder: give it both views as
    ``features`` [B, 2, D].

    Args:
        features: [N, D], or [B, V, ...] with V views of B samples: trailing dimensions are flattened, views become rows view-major
            (N = V B), and all are anchors.
        labels: integer [B] (or [B, 1], or [1, B]) in [0, C).
        prototypes: [C, E], one of each class: a classifier's weights. Its bias, if it has one, is a further column where x holds a 1. These
            and what follows are cast to the dtype of ``features``.
        momentum_features: [B, D] or [B, V, ...], rows of the same samples that are contrasted with and are no anchors.
        class_features: [B, E] or [B, V, ...], what of each anchor meets the prototypes; the authors' are the backbone's, before the
            projection to ``features``. Default: the features, as they come. They and the prototypes keep their lengths.
        alpha: weight of each positive row, beside the prototype's; 0.05 and 0.045 in the authors' ImageNet-LT.
        beta: weight of the own prototype, above 0.
        gamma: weight of the rows in the denominator; 0 leaves a classifier whose targets are drawn to positives.
        class_counts: integer or floating [C], of each class's samples; None: pi is left out. A class without any counts as 1e-9 of all.
        label_smoothing: share of the other classes in q, in [0, 1]; GPaCo's, over C - 1 classes.
        temperature: tau, a number or a 0-d tensor, which may require grad.
        class_temperature: tau_c, the same.
        normalize: bring features, momentum features and the queue's rows to unit length first.
        queue: rows of earlier batches. In training mode the batch is put into it afterwards: the momentum features, without them the last
            view. It begins empty (the authors' with random rows).
        reduction: "mean" over anchors, "sum", or "none": [N].
        group: the process group whose ranks' rows meet, see ``fastsupcon.functional.supcon_loss``. Prototypes are
            the same on all ranks, a queue takes in all ranks' rows. None: this process alone.
        across: how rows of other ranks come: "gather" them all, or a rank's at a time by a "ring".
        backend: "auto", the fastest that serves these rows, or one by name.

    Returns:
        The loss in float32, for float64 features in float64. Gradients have the dtype of their tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the text names it. On a GPU and under
            torch.compile a label out of range is an assertion on the device, and counts that are negative make the loss NaN: reading them
            back would wait.

    Cost: with M momentum rows and K in the queue 2 N (N + M + K) D + 2 N C E flops forward, less N^2 D where a pair of the batch is visited
    once, and three times that backward; memory O((N + M + K) D + (N + C) E). A call of the operator for each block.
    """
    ranks = ranks_of(group, across)
    z, views = rows_of(features, least=1 if ranks is None else 0)
    samples = features.shape[0]
    x = z if class_features is None else _rows_beside("class_features", class_features, samples, z)
    check_prototypes(prototypes, x)
    classes = len(prototypes)
    _check_options(alpha, beta, gamma, label_smoothing, temperature, class_temperature, queue, reduction)
    if len(x) != len(z):
        raise ValueError(f"class_features must be {len(z)} rows like the features, got {len(x)}")
    if label_smoothing > 0 and classes == 1:
        raise ValueError("label_smoothing needs at least 2 prototypes, got 1: there is no other class")
    labels = class_labels(labels, samples, z.device)
    _checks.within("labels", labels, 0, classes)
    keys, others, keys_of_others = labels.repeat(views), z[len(z) - samples :], labels
    if momentum_features is not None:
        others = _rows_beside("momentum_features", momentum_features, samples, z)
        _checks.rows("momentum_features", others, columns=z.shape[1], least=0)
        keys_of_others = labels.repeat(len(others) // max(1, samples))
    if ranks is not None:
        meet_with_prototypes(
            ranks,
            "paco_loss",
            z,
            prototypes,
            temperature,
            reduction,
            counts={"others": len(others)},
            views=views,
            momentum_features=said(momentum_features),
            class_features=said(class_features),
            class_counts=said(class_counts),
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            label_smoothing=label_smoothing,
            class_temperature=said(class_temperature),
            queue=said(queue),
            normalize=normalize,
        )
    with no_autocast(z):
        p = prototypes.to(z.dtype)
        scale, class_scale = 1 / wide_number(temperature, z), 1 / wide_number(class_temperature, z)
        blocks = [shared(Pairs(z, scale=scale, unit=normalize, row_keys=keys), ranks, "rows", "rows")]
        if momentum_features is not None:
            blocks.append(shared(Pairs(z, others, scale, normalize, None, keys, keys_of_others), ranks, "rows", "others"))
        blocks += queue_block(queue, z, keys, scale, normalize)
        contrast = quantities(blocks, "all", "similarity", "count", backend=backend)
        prior = None if class_counts is None else log_prior(class_counts, p)
        bias = None if prior is None else prior * class_scale
        of_classes = Pairs(x, p, class_scale, False, bias, keys, torch.arange(classes, device=z.device))
        parametric = quantities([of_classes], "all", "similarity", backend=backend)
        target = parametric.similarity if prior is None else parametric.similarity + prior[keys] * class_scale
        if label_smoothing > 0:
            together = (wide_rows(x, False) * wide_rows(p, False).sum(0)).sum(1) * class_scale  # of all classes' logits
            together = together if bias is None else together + bias.sum()
            target = (1 - label_smoothing) * target + label_smoothing / (classes - 1) * (together - target)
        everything = logaddexp(parametric.all, contrast.all + math.log(gamma)) if gamma > 0 else parametric.all
        positive = (beta * target + alpha * contrast.similarity) / (beta + alpha * contrast.count)
        loss = reduce(everything - positive, reduction, ranks=ranks)
    if queue is not None and queue.training:
        put(queue, others, keys_of_others, ranks, "others")
    return loss


def _rows_beside(name: str, features: Tensor, samples: int, z: Tensor) -> Tensor:
    """What else there is of the samples [B, ...] that the rows z are of, as rows of their dtype."""
    rows, _ = rows_of(features, name, least=0)
    if features.shape[0] != samples:
        raise ValueError(f"{name} must be of {samples} samples like the features, got {features.shape[0]}")
    _checks.on_device(name, rows, z.device)
    return rows.to(z.dtype)


def _check_options(
    alpha: float,
    beta: float,
    gamma: float,
    label_smoothing: float,
    temperature: float | Tensor,
    class_temperature: float | Tensor,
    queue: object,
    reduction: object,
) -> None:
    check_options(temperature, reduction, queue)
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        _checks.number(name, value, 0, math.inf)
    if beta == 0:
        raise ValueError("beta must be above 0, got 0: an anchor without another of its class would have no positive")
    _checks.number("label_smoothing", label_smoothing, 0, 1)
    _checks.temperature("class_temperature", class_temperature)


class PaCoLoss(PrototypeLoss):
    """``fastsupcon.functional.paco_loss`` with learned ``prototypes`` [num_classes, dim], which are the classifier.

    Hand the prototypes to the optimiser with the network's parameters: ``[*model.parameters(), *loss.parameters()]``.

    Args:
        num_classes: C.
        dim: E, that of the prototypes and of what meets them: the class features, else the features.
        class_counts: as the other options, that of the function; any sequence of numbers. Held as a buffer.

    Examples:
        >>> paco = PaCoLoss(num_classes=1000, dim=2048, class_counts=counts, queue=MemoryQueue(8192, 128))
        >>> paco(projected, labels, momentum_projected, backbone).backward()  # [B, 128], [B], [B, 128], [B, 2048]
        >>> paco.logits(backbone).argmax(1)  # the class, without the prior

        GPaCo, of two views of each sample:

        >>> paco(projected, labels, class_features=backbone).backward()  # [B, 2, 128], [B], [B, 2, 2048]
    """

    alpha: float
    beta: float
    gamma: float
    label_smoothing: float
    class_temperature: float | Tensor
    queue: MemoryQueue | None
    reduction: Reduction
    group: ProcessGroup | None
    across: Across
    backend: Backend

    def __init__(
        self,
        num_classes: int,
        dim: int,
        class_counts: Tensor | Sequence[float] | None = None,
        alpha: float = 0.05,
        beta: float = 1.0,
        gamma: float = 1.0,
        *,
        label_smoothing: float = 0.0,
        temperature: float | Tensor = 0.2,
        class_temperature: float | Tensor = 1.0,
        normalize: bool = True,
        queue: MemoryQueue | None = None,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
        across: Across = "gather",
        backend: Backend = "auto",
    ) -> None:
        _check_options(alpha, beta, gamma, label_smoothing, temperature, class_temperature, queue, reduction)
        ranks_of(group, across)
        super().__init__(
            num_classes,
            dim,
            class_counts=class_counts,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            label_smoothing=label_smoothing,
            temperature=temperature,
            class_temperature=class_temperature,
            normalize=normalize,
            queue=queue,
            reduction=reduction,
            group=group,
            across=across,
            backend=backend,
        )

    def forward(
        self, features: Tensor, labels: Tensor, momentum_features: Tensor | None = None, class_features: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            features: [N, D], or [B, V, ...] of V views: the anchors.
            labels: integer [N] or [B], in [0, C).
            momentum_features: [B, D] or [B, V, ...], contrasted with and no anchors.
            class_features: [B, E] or [B, V, ...], what of the anchors meets the prototypes; None: the features.

        Returns:
            0-d, or [N] with reduction="none"; float32, for float64 features float64.
        """
        given = features, labels, self.prototypes, momentum_features, class_features
        return paco_loss(*given, class_counts=self.class_counts, **self.options)

    if TYPE_CHECKING:
        __call__ = forward

    def logits(self, features: Tensor) -> Tensor:
        """x_i . p_c / tau_c of class features [N, dim] -> [N, num_classes]."""
        _checks.rows("features", features, columns=self.prototypes.shape[1])
        return self._logits(features, self.prototypes, self.class_temperature, unit=False)
