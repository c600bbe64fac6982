from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.data.mixing import repeated, set_weights
from fitune.errors import InputError


def parts(counts: list[int], weights: list[float]) -> list[float]:
    seen = [count * weight for count, weight in zip(counts, weights, strict=True)]
    return [one / sum(seen) for one in seen]


def test_without_shares_and_temperature_weights_stay() -> None:
    assert set_weights([10, 20], [1.0, 0.5], [None, None]) == pytest.approx([1.0, 0.5])


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0.1, 5)), min_size=2, max_size=5),
    st.floats(0.01, 0.9),
    st.floats(1, 10),
)
def test_a_share_is_a_share_of_the_epoch_and_the_others_are_all_seen(
    sets: list[tuple[int, float]], share: float, temperature: float
) -> None:
    counts, weights = [count for count, _ in sets], [weight for _, weight in sets]
    found = set_weights(counts, weights, [share, *[None] * (len(sets) - 1)], temperature)
    assert parts(counts, found)[0] == pytest.approx(share)
    rest = sum(count * weight for count, weight in list(zip(counts, weights, strict=True))[1:])
    assert sum(count * weight for count, weight in list(zip(counts, found, strict=True))[1:]) == pytest.approx(rest)


def test_temperature_by_hand() -> None:
    """Sizes 900 and 100 at temperature 2 have parts as 30 to 10."""
    assert parts([900, 100], set_weights([900, 100], [1, 1], [None, None], 2.0)) == pytest.approx([0.75, 0.25])
    even = set_weights([900, 100], [1, 1], [None, None], 1e9)
    assert parts([900, 100], even) == pytest.approx([0.5, 0.5])


def test_shares_of_all_sets() -> None:
    assert parts([10, 30], set_weights([10, 30], [1, 1], [0.5, 0.5])) == pytest.approx([0.5, 0.5])
    with pytest.raises(InputError, match=r"together these are 0\.8, and must be 1"):
        set_weights([10, 30], [1, 1], [0.5, 0.3])
    with pytest.raises(InputError, match="sum up to 1, which leaves nothing"):
        set_weights([10, 30, 5], [1, 1, 1], [0.5, 0.5, None])
    with pytest.raises(InputError, match=r"data\.train\[1\]: has a share of the epoch, but no sample"):
        set_weights([10, 0], [1, 1], [None, 0.5])


def test_samples_are_there_as_often_as_their_weight_says() -> None:
    sets = np.array([0, 1, 1, 1, 1, 2, 3, 3, 3])
    found = Counter(repeated(sets, [2.0, 1.5, 0.0, 1 / 3], seed=0).tolist())
    assert sorted(found[place] for place in range(1, 5)) == [1, 1, 2, 2]
    assert (found[0], found[5], found[6] + found[7] + found[8]) == (2, 0, 1)


def test_every_set_gets_its_own_part_where_weights_are_the_same() -> None:
    # Drawn together, one of them could have more than its part.
    sets = np.repeat(np.arange(20), 10)
    found = sets[repeated(sets, [0.5] * 20, seed=3)]
    assert np.bincount(found).tolist() == [5] * 20
