from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.data import EncodedSample, Message, Sample, encode, epoch_rows, pack, read_samples
from fitune.data.collation import _lay_out
from fitune.data.packing import fill_share
from fitune.data.token_table import Samples


def sample(length: int, start: int = 0) -> EncodedSample:
    return EncodedSample(tuple(range(start, start + length)), (True,) * length)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 64), max_size=60))
def test_pack_holds_every_document_once_and_never_overfills(lengths: list[int]) -> None:
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert rows == pack(lengths, 64)
    # Any-fit: no two rows could be one.
    totals = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > 64


def test_pack_takes_the_best_fit() -> None:
    assert pack([5, 6, 4, 3, 2], 10) == [[1, 2], [0, 3, 4]]


@pytest.mark.parametrize("length", [0, 11])
def test_pack_refuses_what_cannot_fit(length: int) -> None:
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens"):
        pack([3, length], 10)


def test_alpaca_rows_are_97_percent_full(shared_data: Path, smollm2_tokenizer: Any) -> None:
    samples = [
        encode(one, smollm2_tokenizer)
        for one in read_samples(shared_data / "llamafactory_demo" / "alpaca_en_demo.json")
    ]
    lengths = [len(one) for one in samples]
    assert fill_share(lengths, pack(lengths, 1024), 1024) >= 0.97

    def rows_of(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return [row.samples for row in epoch_rows(samples, 1024, 4, seed, epoch, pack=True, share=False)]

    first = rows_of(0, 0)
    assert fill_share(lengths, first, 1024) >= 0.97
    assert sorted(index for row in first for index in row) == list(range(len(samples)))
    assert first == rows_of(0, 0)
    for other in (rows_of(0, 1), rows_of(1, 0)):
        assert fill_share(lengths, other, 1024) >= 0.97
        together = {frozenset(row) for row in first}
        assert sum(frozenset(row) in together for row in other) < 0.1 * len(
            other
        )  # long ones are alone in any packing


def test_rows_that_share_beginnings_are_97_percent_full(shared_data: Path, smollm2_tokenizer: Any) -> None:
    path = shared_data / "llamafactory_demo" / "alpaca_en_demo.json"
    encoded = [encode(one, smollm2_tokenizer) for one in read_samples(path)]
    samples = Samples.of(one for one in encoded if len(one) <= 512)
    rows = list(epoch_rows(samples, 512, 4, seed=0, epoch=0, pack=True))
    assert sorted(index for row in rows for index in row.samples) == list(range(len(samples)))
    taken = [
        sum(piece.stop - piece.start for piece in _lay_out([samples[i] for i in row.samples], row.shared))
        for row in rows
    ]
    assert max(taken) <= 512
    assert sum(taken) / (512 * len(rows)) >= 0.97
    assert sum(taken) < 0.95 * sum(map(len, samples))  # the system message lies in each row once
    assert rows == list(epoch_rows(list(samples), 512, 4, seed=0, epoch=0, pack=True))


def test_without_packing_every_sample_has_a_row_beside_its_like() -> None:
    samples = [sample(1 + 7 * index % 97) for index in range(101)]
    rows = [row.samples for row in epoch_rows(samples, 128, 4, seed=3, epoch=0, pack=False)]
    assert Counter(map(len, rows)) == {1: 101}
    assert sorted(row[0] for row in rows) == list(range(101))
    assert rows != [row.samples for row in epoch_rows(samples, 128, 4, seed=3, epoch=1, pack=False)]
    spread = [
        max(len(samples[row[0]]) for row in rows[at : at + 4])
        - min(len(samples[row[0]]) for row in rows[at : at + 4])
        for at in range(0, 100, 4)
    ]
    assert sum(spread) / len(spread) < 10
    with pytest.raises(ValueError, match="128 tokens; a row holds 1 to 100"):
        list(epoch_rows([sample(128)], 100, 4, 0, 0, False))


def test_text_is_trained_whole_and_ends_with_eos(smollm2_tokenizer: Any) -> None:
    encoded = encode(Sample(text="one <|im_end|> two"), smollm2_tokenizer)
    assert encoded.tokens[-1] == smollm2_tokenizer.eos_token_id
    assert encoded.tokens.count(smollm2_tokenizer.eos_token_id) == 1
    assert smollm2_tokenizer.decode(list(encoded.tokens)) == "one <|im_end|> two<|im_end|>"
    assert encoded.trained == (False, *[True] * (len(encoded) - 1))
    assert encode(Sample((Message("user", "a"),)), smollm2_tokenizer).trained_tokens == 0
