"""How often the samples of each set are seen in an epoch, so that sets have the parts of it they are given."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from fitune.errors import InputError

T = TypeVar("T")


def set_weights(
    counts: Sequence[int], weights: Sequence[float], shares: Sequence[float | None], temperature: float = 1.0
) -> list[float]:
    """How often the samples of each set are seen in an epoch.

    Args:
        counts: how many samples each set has.
        weights: how often they are seen where nothing else is asked for.
        shares: which part of the epoch's samples a set is to be; None: as it comes. The others together make the
            rest; where all have a part, the epoch is as long as all sets together.
        temperature: of the sets without a share: their parts are in proportion to size ** (1 / temperature), so
            that above 1 small sets are seen more often and large ones less; their sum stays. (Raffel et al. 2020,
            mixing by temperature.)

    Raises:
        InputError: the shares leave nothing, or too much, or a set that has one is empty.
    """
    sizes = [count * weight for count, weight in zip(counts, weights, strict=True)]
    free = [place for place, share in enumerate(shares) if share is None and sizes[place] > 0]
    given = math.fsum(share for share in shares if share is not None)
    empty = [place for place, share in enumerate(shares) if share is not None and not counts[place]]
    if empty:
        raise InputError(f"data.train[{empty[0]}]: has a share of the epoch, but no sample to train")
    if free and given >= 1:
        raise InputError(f"the shares of data.train sum up to {given:g}, which leaves nothing for the others")
    if not free and given and not math.isclose(given, 1, abs_tol=1e-6):
        raise InputError(f"all sets of data.train have a share; together these are {given:g}, and must be 1")
    rest = math.fsum(sizes[place] for place in free)
    whole = rest / (1 - given) if free else math.fsum(sizes)
    heat = {place: sizes[place] ** (1 / temperature) for place in free}
    found = []
    for place, share in enumerate(shares):
        part = share * whole if share is not None else rest * heat[place] / sum(heat.values()) if place in heat else 0
        found.append(part / counts[place] if counts[place] else 0.0)
    return found


def repeated(samples: Sequence[T], weights: Sequence[float], seed: int) -> Iterator[T]:
    """Each sample as often as its weight says; of a fractional part the exact share is drawn by the seed."""
    chance = random.Random(f"weights with seed {seed}")
    extra: set[int] = set()
    for weight in sorted(set(weights)):
        places = [place for place, own in enumerate(weights) if own == weight]
        extra.update(chance.sample(places, round((weight - math.floor(weight)) * len(places))))
    for place, sample in enumerate(samples):
        for _ in range(math.floor(weights[place]) + (place in extra)):
            yield sample
