"""Data that are allowed and seldom meant beside a run's settings: a sentence each, said before it, never refused."""

from __future__ import annotations

from collections.abc import Iterator

from fitune.config.schema import RunConfig
from fitune.data.token_table import Samples


def data_cautions(config: RunConfig, samples: Samples) -> Iterator[str]:
    """What is said of training on `samples`."""
    if config.train.objective != "kto":
        return
    labels = samples.labels()
    good, bad = (int((labels == label).sum()) for label in (2, 1))
    if not good or not bad:
        kind, other = ("good", "bad") if good else ("bad", "good")
        yield (
            f"all {good + bad:,} answers are labelled {kind}, and none {other}: kto learns what tells them apart; "
            "add some, or take objective supervised for good ones"
        )
    if not config.data.pack and config.train.micro_batch * config.train.accumulation == 1:
        yield (
            "a step has one answer, so there is nothing to hold it against (kto compares with the step's other "
            "answers); raise train.accumulation, some dozens are usual"
        )
