"""How the weight moves from features to classifier (alpha), and the learning rate: both pure functions of where training stands."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Schedule = Literal["parabolic-decay", "linear", "cosine", "constant", "parabolic-increment", "beta", "switch", "two-stage"]


def feature_weight(schedule: Schedule, epoch: int, epochs: int, *, switch_at: float = 0.5, seed: int = 0) -> float:
    """alpha of  alpha L_feature + (1 - alpha) L_classifier  in epoch T = 0 ... T_max - 1. The paper's is 1 - (T / T_max)^2.

    "switch" turns from features to classifier at the fraction ``switch_at`` of the epochs; "two-stage" does too, and the network below
    the classifier is frozen from there on. "beta" draws from Beta(0.2, 0.2) for each epoch, the same draw for the same seed and epoch.
    """
    t = epoch / epochs
    if schedule == "beta":
        return float(np.random.default_rng([seed, epoch]).beta(0.2, 0.2))
    return {
        "parabolic-decay": 1 - t**2,
        "linear": 1 - t,
        "cosine": math.cos(math.pi / 2 * t),
        "constant": 0.5,
        "parabolic-increment": t**2,
        "switch": float(epoch < switch_at * epochs),
        "two-stage": float(epoch < switch_at * epochs),
    }[schedule]


def learning_rate(peak: float, step: int, steps: int, *, warmup: float = 0.0, milestones: tuple[float, ...] = ()) -> float:
    """Linear warm-up over the fraction ``warmup`` of the steps, then the half cosine to zero, or x 0.1 at each milestone fraction."""
    t = step / steps
    if t < warmup:
        return peak * (step + 1) / (warmup * steps + 1)
    if milestones:
        return peak * 0.1 ** sum(t >= m for m in milestones)
    return peak * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup)))
