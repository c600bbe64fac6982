"""Intervals against published values, exact enumeration and closed forms."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from fitune.errors import FituneError
from fitune.evaluate.intervals import (
    bootstrap_interval,
    mcnemar_exact,
    paired_difference,
    proportion_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) p. 857, table I, method 3 (score without correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_equals_published_values(successes: int, trials: int, low: float, high: float) -> None:
    interval = proportion_interval(successes, trials)
    assert interval.low == pytest.approx(low, abs=6e-5)
    assert interval.high == pytest.approx(high, abs=6e-5)
    assert interval.low <= interval.value <= interval.high


def test_wilson_bounds_solve_the_score_equation() -> None:
    """The definition: at each bound p, |observed - p| is z standard errors *of p*."""
    interval = proportion_interval(37, 120, level=0.9)
    for bound in (interval.low, interval.high):
        z = abs(37 / 120 - bound) / math.sqrt(bound * (1 - bound) / 120)
        assert z == pytest.approx(1.6448536269514722, rel=1e-9)


def test_proportion_without_trials_is_refused() -> None:
    with pytest.raises(FituneError, match="0 trials"):
        proportion_interval(0, 0)
    with pytest.raises(FituneError, match="5 successes of 4"):
        proportion_interval(5, 4)


def test_bootstrap_equals_exact_enumeration() -> None:
    """For 4 values, all 256 equally likely resamples are known; the seeded quantiles must be theirs."""
    values = [0.0, 1.0, 3.0, 10.0]
    means = sorted(sum(draw) / 4 for draw in itertools.product(values, repeat=4))
    interval = bootstrap_interval(values, resamples=20000, seed=1)
    assert interval.value == 3.5
    assert interval.low == pytest.approx(float(np.quantile(means, 0.025)), abs=0.26)
    assert interval.high == pytest.approx(float(np.quantile(means, 0.975)), abs=0.26)


def test_bootstrap_of_a_mean_agrees_with_the_normal_theory() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 1000)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)
    assert interval == bootstrap_interval(values)
    assert interval != bootstrap_interval(values, seed=1)


def test_bootstrap_of_a_ratio_of_sums() -> None:
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 4.0]])
    interval = bootstrap_interval(rows, lambda sums: sums[0] / sums[1])
    assert interval.value == pytest.approx(4 / 10)
    assert 0.0 <= interval.low < 0.4 < interval.high <= 0.75
    with pytest.raises(FituneError, match="no items"):
        bootstrap_interval([])


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (2, 9), (9, 2), (5, 5), (0, 12)])
def test_mcnemar_equals_enumeration(only_first: int, only_second: int) -> None:
    """All ways the disagreements could have fallen, each equally likely; those as uneven or more, counted."""
    total = only_first + only_second
    uneven = abs(only_first - only_second)
    hits = sum(abs(total - 2 * sum(fall)) >= uneven for fall in itertools.product((0, 1), repeat=total))
    assert mcnemar_exact(only_first, only_second) == pytest.approx(float(Fraction(hits, 2**total)))


def test_mcnemar_does_not_overflow() -> None:
    assert 0.0 <= mcnemar_exact(0, 5000) < 1e-300
    assert mcnemar_exact(2500, 2500) == 1.0


def test_paired_proportions() -> None:
    base = [False] * 90 + [True] * 10
    tuned = [True] * 80 + [False] * 12 + [True] * 8
    found = paired_difference(base, tuned)
    assert (found.only_first, found.only_second) == (2, 80)
    assert found.difference == pytest.approx(0.78)
    assert found.low < 0.78 < found.high
    assert found.p_value == mcnemar_exact(2, 80)
    back = paired_difference(tuned, base)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    all_better = paired_difference([0] * 20, [1] * 20)
    assert all_better.difference == 1.0
    assert 0.6 < all_better.low < 1.0 == all_better.high


@pytest.mark.parametrize("cells", [(0.5, 0.1, 0.3, 0.1), (0.05, 0.05, 0.8, 0.1), (0.25, 0.25, 0.25, 0.25)])
def test_paired_interval_covers_the_truth(cells: tuple[float, float, float, float]) -> None:
    """Exact coverage by enumerating every 2 x 2 table of 20 items: close to 95 %, never far below."""
    count = 20
    truth = cells[2] - cells[1]
    covered = 0.0
    for both in range(count + 1):
        for first in range(count + 1 - both):
            for second in range(count + 1 - both - first):
                neither = count - both - first - second
                ways = math.factorial(count)
                for cell in (both, first, second, neither):
                    ways //= math.factorial(cell)
                chance = ways * math.prod(p**n for p, n in zip(cells, (both, first, second, neither), strict=True))
                if chance < 1e-7:
                    continue
                left = [1] * both + [1] * first + [0] * second + [0] * neither
                right = [1] * both + [0] * first + [1] * second + [0] * neither
                found = paired_difference(left, right)
                covered += chance * (found.low <= truth <= found.high)
    assert 0.93 <= covered <= 0.995


def test_paired_bootstrap_uses_the_pairs() -> None:
    """Two systems that differ by exactly 1 everywhere: the difference is certain though each mean is not."""
    generator = np.random.default_rng(0)
    first = generator.normal(0, 10, 50)
    found = paired_difference(first, first + 1)
    assert found.difference == pytest.approx(1.0)
    assert found.high - found.low < 1e-9
    assert found.p_value < 0.002
    assert paired_difference(first, first[::-1].copy()).p_value > 0.2
    with pytest.raises(FituneError, match="same items"):
        paired_difference([1.5, 2.0], [1.0])
