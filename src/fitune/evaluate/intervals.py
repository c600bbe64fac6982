"""How sure a score is: 95 % intervals for proportions, means and corpus scores, and for a difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fitune.errors import FituneError

LEVEL = 0.95
RESAMPLES = 2000
Rows = npt.NDArray[np.float64]
CorpusScore = Callable[[Rows], float]


@dataclass(frozen=True, slots=True)
class Interval:
    """A score over `count` items, the interval that holds it at the given level, and how that was found."""

    value: float
    low: float
    high: float
    count: int
    method: str
    level: float = LEVEL

    def as_percent(self) -> str:
        """'95.3 % (92.4 to 97.2)', for a score between 0 and 1."""
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Second minus first score on the same items, its interval, and the p-value of 'there is none'.

    Attributes:
        only_first, only_second: items that just one of them got right (None unless outcomes are 0 or 1).
        interval_method, p_method: how both were computed, for the report.
    """

    difference: float
    low: float
    high: float
    p_value: float
    count: int
    interval_method: str
    p_method: str
    only_first: int | None = None
    only_second: int | None = None
    level: float = LEVEL


def proportion_interval(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """Successes out of trials -> the proportion with Wilson's score interval (JASA 22, 1927, p. 209).

    Never wider than 0 to 1 and never of width 0, unlike the plain normal approximation. Raises FituneError
    where there are no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise FituneError(f"{successes} successes of {trials} trials have no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Interval(share, low, high, trials, "Wilson", level)


def bootstrap_interval(
    items: Sequence[float] | Rows,
    score: CorpusScore | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Per-item numbers -> their score with a seeded percentile bootstrap interval (Efron 1979).

    Args:
        items: [n] values, or [n, S] statistics of each item.
        score: from the items' statistics *summed* [S] to the corpus score; None: the mean of the values.

    Raises:
        FituneError: there are no items.
    """
    rows = _rows(items)
    scores = _resampled_scores(rows, score, resamples, seed)
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    value = _score_of(rows.sum(axis=0), len(rows), score)
    method = f"percentile bootstrap, {resamples} resamples, seed {seed}"
    return Interval(value, float(low), float(high), len(rows), method, level)


def paired_difference(
    first: Sequence[bool] | Sequence[float] | Rows,
    second: Sequence[bool] | Sequence[float] | Rows,
    score: CorpusScore | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> PairedDifference:
    """Two systems' results on the same items, in the same order -> second minus first.

    Right-or-wrong outcomes (all 0 or 1, no `score`): Newcombe's interval for paired proportions (Statistics
    in Medicine 17, 1998, p. 2635, method 10) and McNemar's exact test. Anything else: a seeded paired
    bootstrap for both; its p-value is at least 2 / (resamples + 1).

    Raises:
        FituneError: no items, or different numbers of them.
    """
    left, right = _rows(first), _rows(second)
    if left.shape != right.shape:
        raise FituneError(f"a paired comparison needs the same items: {left.shape} against {right.shape}")
    if score is None and left.shape[1] == 1 and np.isin(left, (0, 1)).all() and np.isin(right, (0, 1)).all():
        return _paired_proportions(left[:, 0] == 1, right[:, 0] == 1, level)
    count = len(left)
    observed = _score_of(right.sum(axis=0), count, score) - _score_of(left.sum(axis=0), count, score)
    # The same seed draws the same items for both: that is what makes it paired.
    differences = _resampled_scores(right, score, resamples, seed) - _resampled_scores(left, score, resamples, seed)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    smaller_tail = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    p_value = min(1.0, 2 * (int(smaller_tail) + 1) / (resamples + 1))
    method = f"paired percentile bootstrap, {resamples} resamples, seed {seed}"
    return PairedDifference(observed, float(low), float(high), p_value, count, method, method, level=level)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Items that just one of two systems got right -> two-sided exact p-value (binomial, one half each)."""
    disagreements = only_first + only_second
    smaller = min(only_first, only_second)
    tail = sum(math.comb(disagreements, k) for k in range(smaller + 1))
    # An exact ratio of integers: 2**n has no place in a float beyond some thousand disagreements.
    return min(1.0, 2 * tail / 2**disagreements) if disagreements else 1.0


def _paired_proportions(left: npt.NDArray[np.bool_], right: npt.NDArray[np.bool_], level: float) -> PairedDifference:
    count = len(left)
    both = int(np.count_nonzero(left & right))
    only_first = int(np.count_nonzero(left & ~right))
    only_second = int(np.count_nonzero(~left & right))
    neither = count - both - only_first - only_second
    one = proportion_interval(both + only_second, count, level)
    two = proportion_interval(both + only_first, count, level)
    product = both * neither - only_first * only_second
    # Method 10's continuity correction of the correlation, for positive ones only.
    product_corrected = max(product - count / 2, 0) if product > 0 else product
    scale = math.sqrt((both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither))
    correlation = product_corrected / scale if scale > 0 else 0.0
    difference = one.value - two.value
    below = _combined(one.value - one.low, two.high - two.value, correlation)
    above = _combined(one.high - one.value, two.value - two.low, correlation)
    return PairedDifference(
        difference,
        max(-1.0, difference - below),
        min(1.0, difference + above),
        mcnemar_exact(only_first, only_second),
        count,
        "Newcombe paired",
        "McNemar exact",
        only_first,
        only_second,
        level,
    )


def _combined(left: float, right: float, correlation: float) -> float:
    return math.sqrt(max(0.0, left * left - 2 * correlation * left * right + right * right))


def _rows(items: Sequence[bool] | Sequence[float] | Rows) -> Rows:
    rows = np.asarray(items, dtype=np.float64)
    if rows.shape[0] == 0:
        raise FituneError("there are no items to score")
    return rows.reshape(rows.shape[0], -1)


def _score_of(sums: Rows, count: int, score: CorpusScore | None) -> float:
    return float(sums[0]) / count if score is None else float(score(sums))


def _resampled_scores(rows: Rows, score: CorpusScore | None, resamples: int, seed: int) -> Rows:
    """The score of `resamples` samples of n items drawn with replacement: [resamples]."""
    generator = np.random.default_rng(seed)
    count = len(rows)
    scores = np.empty(resamples)
    for place in range(resamples):
        drawn = rows[generator.integers(0, count, count)].sum(axis=0)
        scores[place] = _score_of(drawn, count, score)
    return scores
