"""The learning rate of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cosine", "linear", "constant", "polynomial", "cosine_restarts"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak` over the first steps, then as `kind` says down to `floor` after the last one.

    Attributes:
        peak: the highest learning rate.
        steps: of the whole run.
        warmup_share: of the steps, from 0 to 1.
        warmup_steps: so many steps instead; None: the share counts.
        floor: the least rate, as a share of the peak.
        power: of a polynomial: 1 is linear.
        cycles: of cosine_restarts: how often the rate falls from the peak.
    """

    kind: Kind
    peak: float
    steps: int
    warmup_share: float
    warmup_steps: int | None = None
    floor: float = 0.0
    power: float = 2.0
    cycles: int = 1

    def rate(self, step: int) -> float:
        """The rate of step 0, 1, ..., steps - 1; never 0 for a step that is taken."""
        warmup = round(self.steps * self.warmup_share) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.peak * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(self.steps - warmup, 1)
        return self.peak * (self.floor + (1 - self.floor) * self._left(done))

    def _left(self, done: float) -> float:
        """What is left of the peak after a share of the steps that follow the warm-up, 1 to 0."""
        if self.kind == "constant":
            return 1.0
        if self.kind == "linear":
            return 1 - done
        if self.kind == "polynomial":
            return float((1 - done) ** self.power)
        if self.kind == "cosine_restarts":
            done = done * self.cycles % 1.0
        return 0.5 * (1 + math.cos(math.pi * done))
