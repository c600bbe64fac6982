"""Losses that stand out from those before them, and the samples that made them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fitune.data.collation import collate
from fitune.data.encoding import EncodedSample
from fitune.fuse.model import FusedModel
from fitune.step.objective import SUPERVISED, Objective, measure

# A step is held against so many before it, once there are LEAST of them: above so many of their standard deviations,
# and above their mean by this share, it is a spike.
WINDOW, LEAST = 64, 16
DEVIATIONS, SHARE = 5.0, 0.5
SHOWN, LOOKED_AT = 3, 256


class SpikeWatch:
    """Hears the loss of every step."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._above = 0  # spikes in a row

    def hear(self, loss: float) -> float | None:
        """The mean that this loss stands out from; None: it does not, or goes on as the one before did.

        A spike is not counted for the losses after it, but LEAST in a row are no spikes: it is how losses are now.
        """
        if len(self._losses) >= LEAST:
            mean = math.fsum(self._losses) / len(self._losses)
            deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in self._losses) / len(self._losses))
            if loss > mean + max(DEVIATIONS * deviation, SHARE * mean):
                self._above += 1
                if self._above >= LEAST:
                    self._losses.clear()
                return mean if self._above == 1 else None
        self._above = 0
        self._losses.append(loss)
        return None


@dataclass(frozen=True)
class SampleLoss:
    """A sample's place in its file, and its loss: of supervised training the mean over its trained tokens."""

    origin: str
    loss: float


def worst_samples(
    model: FusedModel, samples: Sequence[EncodedSample], row_tokens: int, objective: Objective = SUPERVISED
) -> list[SampleLoss]:
    """The samples of the highest loss, worst first, as the model is now; leaves it and its random state alone.

    Of very many the first LOOKED_AT are looked at: each takes a pass of its own.
    """
    was_training = model.graph.training
    model.graph.eval()
    found = []
    with torch.random.fork_rng(devices=[]):
        batches = [collate([[sample]], row_tokens, 0) for sample in samples[:LOOKED_AT]]
        objective = objective.begin(model, batches)  # what a sample is held against is made of all of them
        for sample, batch in zip(samples, batches, strict=False):
            if batch.trained_tokens:
                loss = measure(model, [batch], objective, has_begun=True).loss
                found.append(SampleLoss(str(sample.origin), loss))
    model.graph.train(was_training)
    found.sort(key=lambda one: -one.loss if math.isfinite(one.loss) else -math.inf)
    return found[:SHOWN]
