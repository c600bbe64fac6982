from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.data import EncodedSample, collate


def sample(length: int, start: int = 0) -> EncodedSample:
    return EncodedSample(tuple(range(start, start + length)), (True,) * length)


def test_collate_lays_out_documents_padding_and_weights() -> None:
    left = EncodedSample((11, 12, 13), (True, False, True))
    batch = collate([[left, sample(2, 20)], [sample(4, 30)]], row_tokens=8, pad_id=9)
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
    assert batch.tokens.shape[1] == max(map(sum, rows))
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
