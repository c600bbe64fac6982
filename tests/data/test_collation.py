from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.data import EncodedSample, collate
from fitune.data.prefixes import _common, find_prefixes


def sample(length: int, start: int = 0) -> EncodedSample:
    return EncodedSample(tuple(range(start, start + length)), (True,) * length)


def test_collate_lays_out_documents_padding_and_weights() -> None:
    left = EncodedSample((11, 12, 13), (True, False, True))
    batch = collate([[left, sample(2, 20)], [sample(4, 30)]], row_tokens=5, pad_id=9)
    assert batch.tokens.tolist() == [[11, 12, 13, 20, 21], [30, 31, 32, 33, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.weights.tolist() == [[0, 0, 1, 0, 1], [0, 1, 1, 1, 0]]
    assert batch.bounds.tolist() == [0, 3, 5, 9, 10]
    dtypes = (batch.tokens.dtype, batch.positions.dtype, batch.weights.dtype, batch.bounds.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.float32, torch.int32)
    assert batch.trained_tokens == 5


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_collate_loses_nothing(rows: list[list[int]]) -> None:
    packed = [[sample(length, 100 * place) for place, length in enumerate(row)] for row in rows]
    batch = collate(packed, 36, pad_id=-1)
    assert batch.tokens.shape[1] == 36  # rounded up, but no longer than a row
    flat, bounds = batch.tokens.flatten(), batch.bounds.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == flat.numel()
    documents = [flat[start:end].tolist() for start, end in pairwise(bounds)]
    assert [d for d in documents if d[0] != -1] == [list(one.tokens) for row in packed for one in row]
    positions = batch.positions.flatten()
    for start, end in pairwise(bounds):
        assert positions[start:end].tolist() == list(range(end - start))
        assert batch.weights.flatten()[start] == 0


def test_collate_refuses_what_is_no_batch() -> None:
    for rows in ([], [[]], [[EncodedSample((), ())]]):
        with pytest.raises(ValueError, match="at least one"):
            collate(rows, 8, 0)
    with pytest.raises(ValueError, match="a row of 9 tokens, but rows hold 8"):
        collate([[sample(9)]], 8, 0)


def test_rows_are_rounded_up_to_sizes_that_recur() -> None:
    for longest, width in ((1, 64), (64, 64), (65, 128), (150, 150)):
        batch = collate([[sample(longest)], [sample(1)]], 150, pad_id=7)
        assert batch.tokens.shape == (2, width)
        assert batch.tokens[0, longest:].tolist() == [7] * (width - longest)
        assert batch.trained_tokens == longest - 1


def test_a_shared_beginning_lies_there_once() -> None:
    one, other = (
        EncodedSample((1, 2, 3, 4), (False,) * 3 + (True,)),
        EncodedSample((1, 2, 5, 6), (False,) * 3 + (True,)),
    )
    batch = collate([[one, other, one]], 10, 0, [[(0, 2), (0, 2), (-1, 0)]])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 1, 2, 3, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3, 0, 1, 2, 3]]
    assert batch.weights.tolist() == [[0, 0, 0, 1, 0, 1, 0, 0, 0, 1]]
    assert batch.documents.tolist() == [[0, 0, 2, 0, 0], [0, 2, 4, 0, 2], [0, 4, 6, 0, 2], [0, 6, 10, 0, 0]]
    with pytest.raises(ValueError, match="no bounds"):
        _ = batch.bounds


def test_beginnings_that_are_not_shared_or_trained_are_refused() -> None:
    def pair(first: tuple[int, ...], second: tuple[int, ...], trained: tuple[bool, ...]) -> list[EncodedSample]:
        return [EncodedSample(first, trained), EncodedSample(second, trained)]

    last = (False, False, False, True)
    for rows, common, words in (
        (pair((1, 2, 3, 4), (1, 9, 3, 4), last), 2, "do not share"),
        (pair((1, 2, 3, 4), (1, 2, 3, 4), last), 4, "do not share"),
        (pair((1, 2, 3, 4), (1, 2, 3, 4), (False, True, True, True)), 2, "is trained"),
        (pair((1, 2, 3, 4), (1, 2, 3, 4), last), 3, "is trained"),
    ):
        with pytest.raises(ValueError, match=words):
            collate([rows], 16, 0, [[(0, common)] * 2])


def test_prefixes_end_before_what_is_trained_and_are_long_enough() -> None:
    long = tuple(range(40))
    early = EncodedSample((*long, 99), (False, False, False, *(True,) * 38))
    late = EncodedSample((*long, 98), (*(False,) * 40, True))
    assert find_prefixes([early, late]).group == (-1, -1)  # 2 tokens would be too few
    both = find_prefixes([late, EncodedSample((*long, 97), late.trained)])
    assert (both.group, both.tokens) == ((0, 0), (39,))


def test_padding_that_is_the_end_token_takes_nothing_away() -> None:
    end = 2
    sample = EncodedSample((5, 6, end, 7, 8, end), (False, True, True, False, True, True))
    batch = collate([[sample]], 64, pad_id=end)
    trained = batch.tokens[0][batch.weights[0] > 0].tolist()
    assert trained == [6, end, 8, end]
    assert batch.tokens.shape[1] > len(sample)
    other = collate([[sample]], 64, pad_id=0)
    assert (batch.weights == other.weights).all()


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_common_beginnings(one: list[int], other: list[int], shared: int) -> None:
    other = [*one[:shared], *other]
    naive = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    assert _common(tuple(one), tuple(other)) == (min(len(one), len(other)) if naive is None else naive)
