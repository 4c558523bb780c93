"""The arguments of supcon_loss, each by itself and together."""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor

from .. import _checks
from ..options import CONTRAST_MODES, DENOMINATORS, FORMS, LONE_ANCHORS, Denominator, Form
from . import _frame


def are_several(labels: object, samples: int) -> TypeGuard[Tensor]:
    """Whether labels are [B, C], C > 1: a row of classes for each sample, and not one class each in a row or a column."""
    return isinstance(labels, Tensor) and labels.ndim == 2 and tuple(labels.shape) not in ((samples, 1), (1, samples))


def check_positives(features: Tensor, labels: object, mask: object, positives: object, keys: object, anchors: int) -> None:
    samples, device = features.shape[0], features.device
    if isinstance(labels, Tensor):
        _checks.dense("labels", labels)
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
        _checks.dense("mask", mask)
        if list(mask.shape) != [samples, samples]:
            raise ValueError(f"mask must have shape [{samples}, {samples}], got {list(mask.shape)}")
        _checks.on_device("mask", mask, device)
        _checks.not_negative("mask", mask)
    if positives is not None:
        if not isinstance(positives, Tensor) or positives.is_floating_point() or positives.is_complex() or positives.dtype == torch.bool:
            raise TypeError(
                f"positives must be a torch.Tensor of an integer dtype, got {getattr(positives, 'dtype', type(positives).__name__)}"
            )
        _checks.dense("positives", positives)
        if positives.ndim != 2 or positives.shape[0] != anchors or (anchors > 0 and positives.shape[1] == 0):
            raise ValueError(f"positives must have shape [{anchors}, K] with K >= 1, got {list(positives.shape)}")
        _checks.on_device("positives", positives, device)
        columns = len(keys) if isinstance(keys, Tensor) else samples * (1 if features.ndim == 2 else features.shape[1])
        if positives.numel():
            _checks.within("positives", positives, -1, columns)
    if are_several(labels, samples):
        if labels.shape[0] != samples:
            raise ValueError(f"labels must have shape [{samples}] or [{samples}, C], got {list(labels.shape)}")
        _checks.on_device("labels", labels, device)
        is_view = labels.shape == features.shape
        _checks.not_negative("labels (a second view goes into features, torch.stack([z1, z2], dim=1))" if is_view else "labels", labels)


def check_together(
    z: Tensor,
    by_keys: bool,
    classes: Tensor | None,
    positives: Tensor | None,
    form: Form,
    denominator: Denominator,
    beta: float,
    keys: Tensor | None,
    key_labels: object,
    ignore_index: object,
    queue: object,
    least: int,
) -> None:
    """``least``: how many keys there must be."""
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
    if ignore_index is not None and classes is None:
        raise ValueError("ignore_index needs labels, one class a row, and got none")
    if keys is not None:
        if classes is None and positives is None:
            raise ValueError("keys needs labels, one class a row, or positives, and got none")
        _checks.rows("keys", keys, columns=z.shape[1], least=least)
        _checks.on_device("keys", keys, z.device)
    if key_labels is None and keys is not None and positives is None:
        raise ValueError("key_labels must be given together with keys and labels, got None")
    if key_labels is not None and (keys is None or positives is not None):
        raise ValueError(f"key_labels must be given together with keys and labels, got {'no keys' if keys is None else 'positives'}")
    if ignore_index is not None and not _checks.is_integer(ignore_index):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def check_options(
    temperature: float | Tensor,
    contrast_mode: object,
    base_temperature: float | None,
    form: object,
    denominator: object,
    beta: float,
    reduction: object,
    lone_anchors: object,
    queue: object,
) -> None:
    _frame.check_options(temperature, reduction, queue)
    if base_temperature is not None:
        _checks.temperature("base_temperature", base_temperature)
    _checks.one_of("contrast_mode", contrast_mode, CONTRAST_MODES)
    _checks.one_of("form", form, FORMS)
    _checks.one_of("denominator", denominator, DENOMINATORS)
    _checks.one_of("lone_anchors", lone_anchors, LONE_ANCHORS)
    _checks.number("beta", beta, 0, math.inf)
