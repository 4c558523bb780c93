"""Which images a branch sees: a class is drawn by a rule, then that class's next image from a shuffled deck.

Decks, and not independent draws, so that every image of a class is used before any of them repeats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["instance", "class-balanced", "square-root", "reverse", "budgeted"]
POWERS = {"instance": 1.0, "class-balanced": 0.0, "square-root": 0.5, "reverse": -1.0}


def power_within(budget: int, most_shown: int, counts: Tensor) -> float:
    """The smallest p in [0, 1] with which ``budget`` draws show an image of the rarest class at most ``most_shown`` times.

    A class of n images comes with probability ~ n^p. Short training may balance its classes; in long training few images would repeat
    until they are known by heart. 1, a plain pass, where even that repeats them more often.
    """
    counts = counts.double()

    def shown(power: float) -> float:
        return float(budget * counts.min() ** (power - 1) / counts.pow(power).sum())

    low, high = 0.0, 1.0
    if shown(low) <= most_shown or shown(high) >= most_shown:
        return low if shown(low) <= most_shown else high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if shown(middle) > most_shown else (low, middle)
    return high


class Sampler:
    """Draws indices of ``labels``. A class with n images comes with probability proportional to

        instance  n (one deck for all: a plain shuffled pass)    class-balanced  1    square-root  sqrt(n)    reverse  1 / n
        budgeted  n^p, where p follows from ``budget``, all draws of training, and ``most_shown``: see :func:`power_within`

    ``prior`` [C] holds these probabilities. The state fits in a checkpoint: a sampler that loads it goes on with exactly the draws the
    saved one would have made.
    """

    def __init__(self, labels: Tensor, rule: Rule, seed: int, budget: int = 0, most_shown: int = 0) -> None:
        counts = labels.bincount()
        power = power_within(budget, most_shown, counts) if rule == "budgeted" else POWERS[rule]
        self.prior = counts.double().pow(power)
        self.prior /= self.prior.sum()
        deck_of = torch.zeros_like(labels) if power == 1 else labels
        self.order = deck_of.argsort(stable=True)  # the decks end to end
        self.sizes = deck_of.bincount()
        self.starts = (self.sizes.cumsum(0) - self.sizes).tolist()
        self.used = self.sizes.tolist()  # as if used up: a deck is shuffled when it is first needed
        self.weights = self.sizes.double().pow(power)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        """The next ``count`` indices, int64 on the CPU."""
        if len(self.sizes) == 1:
            return self._deal(0, count)
        decks = torch.multinomial(self.weights, count, replacement=True, generator=self.generator)
        indices = torch.empty(count, dtype=torch.int64)
        wanted = decks.bincount(minlength=len(self.sizes)).tolist()
        indices[decks.argsort(stable=True)] = torch.cat([self._deal(deck, k) for deck, k in enumerate(wanted) if k])
        return indices

    def _deal(self, deck: int, count: int) -> Tensor:
        start, size = self.starts[deck], int(self.sizes[deck])
        cards = self.order[start : start + size]
        dealt = []
        while count:
            if self.used[deck] == size:
                cards[:] = cards[torch.randperm(size, generator=self.generator)]
                self.used[deck] = 0
            take = min(count, size - self.used[deck])
            dealt.append(cards[self.used[deck] : self.used[deck] + take].clone())
            self.used[deck] += take
            count -= take
        return torch.cat(dealt)

    def state_dict(self) -> dict[str, Tensor]:
        return {"order": self.order.clone(), "used": torch.tensor(self.used), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.order, self.used = state["order"].clone(), state["used"].tolist()
        if len(self.used) != len(self.sizes):  # the run was extended, and its budget is that of a plain pass now: a new deck
            self.used = self.sizes.tolist()
        self.generator.set_state(state["generator"])
