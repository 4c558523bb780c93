"""How the weight moves from features to classifier (alpha), and the learning rate: pure functions of where training stands."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np


def _switch(t: float, switch_at: float) -> tuple[float, float]:
    return (1.0, 0.0) if t < switch_at else (0.0, 1.0)


def _turn(alpha: float) -> tuple[float, float]:
    return alpha, 1 - alpha


#: Weights of the feature loss and of the classifier's at the fraction t of the epochs. The paper's is the parabolic decay.
SCHEDULES: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "parabolic-decay": lambda t, _: _turn(1 - t**2),
    "linear": lambda t, _: _turn(1 - t),
    "cosine": lambda t, _: _turn(math.cos(math.pi / 2 * t)),
    "constant": lambda t, _: _turn(0.5),
    "parabolic-increment": lambda t, _: _turn(t**2),
    "beta": lambda t, _: _turn(math.nan),  # drawn for each epoch, see branch_weights
    "switch": _switch,
    "two-stage": _switch,
    "sum": lambda t, _: (1.0, 1.0),
}


def branch_weights(schedule: str, epoch: int, epochs: int, *, switch_at: float = 0.5, seed: int = 0) -> tuple[float, float]:
    """(alpha, 1 - alpha) of  alpha L_feature + (1 - alpha) L_classifier  in epoch T < T_max. The paper's alpha is 1 - (T / T_max)^2.

    "switch" turns from features to classifier at the fraction ``switch_at`` of the epochs; "two-stage" does too, and the network below
    the classifier is frozen from there on. "beta" draws from Beta(0.2, 0.2) for each epoch, the same draw for the same seed and epoch.
    "sum" is 1 for both.
    """
    if schedule == "beta":
        return _turn(float(np.random.default_rng([seed, epoch]).beta(0.2, 0.2)))
    return SCHEDULES[schedule](epoch / epochs, switch_at)


@functools.cache  # a recipe asks for it at each of 1,000 epochs
def switch_epoch(switch_at: float, epochs: int) -> int:
    """The first epoch of the classifier in "switch" and "two-stage", by their own comparison: ceil(switch_at * epochs) rounds otherwise."""
    return sum(epoch / epochs < switch_at for epoch in range(epochs))


def learning_rate(
    peak: float, step: int, steps: int, *, warmup: float = 0.0, milestones: tuple[float, ...] = (), factor: float = 0.1
) -> float:
    """Linear warm-up over the fraction ``warmup`` of the steps, then the half cosine to zero, or x ``factor`` at each milestone."""
    t = step / steps
    if t < warmup:
        return peak * (step + 1) / (warmup * steps + 1)
    if milestones:
        return peak * factor ** sum(t >= m for m in milestones)
    return peak * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup)))
