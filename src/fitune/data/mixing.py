"""How often the samples of each set are seen in an epoch, so that sets have the parts of it they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fitune.data.chance import shuffled
from fitune.errors import InputError


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


def repeated(sets: NDArray[Any], weights: Sequence[float], seed: int) -> NDArray[np.int64]:
    """Places of the samples of an epoch, each as often as its set's weight says.

    Of a fractional part the exact share of each set is drawn by the seed. `sets`: which set each sample is of.
    """
    whole = np.floor(np.asarray(weights, dtype=np.float64)).astype(np.int64)
    times = whole[sets]
    for number, weight in enumerate(weights):
        places = np.flatnonzero(sets == number)
        extra = round((weight - math.floor(weight)) * len(places))
        if extra:
            times[places[shuffled(len(places), f"weights of set {number} with seed {seed}")[:extra]]] += 1
    return np.arange(len(sets)) if (times == 1).all() else np.repeat(np.arange(len(sets)), times)
