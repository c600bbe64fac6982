"""The learning rate of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak` over the first steps, then as `kind` says down to 0 after the last one.

    Attributes:
        peak: the highest learning rate.
        steps: of the whole run.
        warmup_share: of the steps, from 0 to 1.
    """

    kind: Literal["cosine", "linear", "constant"]
    peak: float
    steps: int
    warmup_share: float

    def rate(self, step: int) -> float:
        """The rate of step 0, 1, ..., steps - 1; never 0 for a step that is taken."""
        warmup = round(self.steps * self.warmup_share)
        if step < warmup:
            return self.peak * (step + 1) / (warmup + 1)
        if self.kind == "constant":
            return self.peak
        done = (step - warmup) / max(self.steps - warmup, 1)
        if self.kind == "linear":
            return self.peak * (1 - done)
        return self.peak * 0.5 * (1 + math.cos(math.pi * done))
