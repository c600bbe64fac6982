from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.data import EncodedSample, Origin, ahead, token_table
from fitune.data.order import epoch_rows
from fitune.data.split import groups_of, of_documents
from fitune.data.token_table import Samples, TableWriter, TokenTable, packed

samples_of = st.lists(
    st.builds(
        lambda pairs, line, counts: EncodedSample(
            tuple(token for token, _ in pairs),
            tuple(on for _, on in pairs),
            Origin("a.jsonl", line),
            *counts[:3],
            bool(counts[3] % 2),
            bool(counts[4] % 2),
        ),
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=20),
        st.integers(1, 2**40),
        st.lists(st.integers(0, 1000), min_size=5, max_size=5),
    ),
    max_size=12,
)


@given(samples_of, st.integers(1, 5))
def test_a_table_gives_back_what_was_put_in(
    tmp_path_factory: pytest.TempPathFactory, samples: list[EncodedSample], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("table")
    for writer, place in ((TableWriter(), None), (TableWriter(folder), folder)):
        for start in range(0, len(samples), chunk):
            writer.append(packed(samples[start : start + chunk]))
        table = TokenTable(writer.close() if place is None else _closed(writer, folder), "a.jsonl")
        assert [table[index] for index in range(len(table))] == samples
        assert table.length.tolist() == [len(sample) for sample in samples]
        assert table.trained.tolist() == [sample.trained_tokens for sample in samples]


def _closed(writer: TableWriter, folder: Path) -> Path:
    writer.close()
    return folder


@given(samples_of)
def test_keys_are_equal_where_tokens_and_masks_are(samples: list[EncodedSample]) -> None:
    both = Samples.of([*samples, *samples])
    groups, first = groups_of(both.keys())
    content = [(sample.tokens, sample.trained) for sample in [*samples, *samples]]
    for one in range(len(content)):
        assert [groups[one] == groups[other] for other in range(len(content))] == [
            content[one] == other for other in content
        ]
        assert first[groups[one]] == content.index(content[one])


def test_a_file_that_was_cut_short_is_no_table(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path)
    writer.append(packed([EncodedSample((1, 2, 3), (False, True, True))] * 4))
    writer.close()
    table = TokenTable(tmp_path, None)
    (tmp_path / "tokens.bin").write_bytes((tmp_path / "tokens.bin").read_bytes()[:40])
    assert table[1].tokens == (1, 2, 3)
    with pytest.raises(OSError, match=r"tokens\.bin is shorter than it was"):
        table[3]


def test_samples_of_several_tables() -> None:
    one = TokenTable(packed([EncodedSample((n,), (True,)) for n in range(3)]), "a")
    two = TokenTable(packed([EncodedSample((n, n), (True, False)) for n in range(3, 5)]), "b")
    whole = Samples([one, two])
    assert [sample.tokens[0] for sample in whole] == [0, 1, 2, 3, 4]
    chosen = whole.take(np.array([4, 0, 0, 3]))
    assert [sample.tokens[0] for sample in chosen] == [4, 0, 0, 3]
    assert chosen.lengths.tolist() == [2, 1, 1, 2]
    assert chosen.table_of().tolist() == [1, 0, 0, 1]
    assert chosen[1:3].trained_tokens() == 2
    assert chosen.numbers().tolist() == [1, 0, 0, 0]
    assert chosen.digest() != whole.take(np.array([4, 0, 3, 0])).digest()
    assert chosen == whole.take(np.array([4, 0, 0, 3]))
    with pytest.raises(IndexError):
        chosen[4]


def test_parts_of_a_document_stay_with_the_first() -> None:
    groups = np.array([0, 1, 2, 3, 1])
    found = of_documents(groups, np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2], dtype=np.uint64))
    assert found.tolist() == [0, 0, 2, 3, 1]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed by Linux")
def test_more_tables_than_files_may_be_open(tmp_path: Path) -> None:
    for number in range(120):
        (folder := tmp_path / str(number)).mkdir()
        writer = TableWriter(folder)
        writer.append(packed([EncodedSample((number, 7), (False, True))]))
        writer.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    samples = Samples([TokenTable(tmp_path / str(number), "a.jsonl") for number in range(120)])
    for _ in range(2):
        assert [sample.tokens[0] for sample in samples] == list(range(120))
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 96


def test_another_table_in_the_same_place_is_read_afresh(tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        folder = tmp_path / f"new{number}"
        folder.mkdir()
        writer = TableWriter(folder)
        writer.append(packed([EncodedSample((number, 7), (False, True))]))
        writer.close()
        if (tmp_path / "table").exists():
            (tmp_path / "table").rename(tmp_path / "old")
        folder.rename(tmp_path / "table")
        found.append(TokenTable(tmp_path / "table", "a.jsonl"))
        assert found[-1][0].tokens == (number, 7)
    assert found[0][0].tokens == (1, 7)


def test_an_epoch_of_samples_on_disk_is_that_of_samples_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tables of two files, held some hundreds at a time, read with what is between them, in far fewer reads."""
    on_disk = Samples([_on_disk(tmp_path / name, count) for name, count in (("one", 700), ("two", 1700))])
    places = np.random.default_rng(1).permutation(2400)[:2000]  # not all of them, and some twice
    on_disk = on_disk.take(np.concatenate([places, places[:100]]))
    in_memory = Samples.of([on_disk[number] for number in range(len(on_disk))])
    expected = list(epoch_rows(in_memory, 64, 1, seed=3, epoch=0, pack=True))
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: read.append(given[1]) or pread(*given))
    for held, gap, largest in ((64 << 20, 1 << 18, 16 << 20), (40_000, 200, 1000), (1, 0, 1)):
        monkeypatch.setattr(ahead, "HELD_BYTES", held)
        monkeypatch.setattr(ahead, "GAP_BYTES", gap)
        monkeypatch.setattr(ahead, "READ_BYTES", largest)
        read.clear()
        assert list(epoch_rows(on_disk, 64, 1, seed=3, epoch=0, pack=True)) == expected
        if largest > 1000:
            assert len(read) == 2
        elif largest > 1:
            assert 100 < len(read) < 1500
            assert max(read) <= largest


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.data())
def test_samples_that_are_held_are_those_asked_for(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("ahead")
    writer = TableWriter(folder)
    content = [EncodedSample(tuple(range(n, n + length)), (n % 2 == 0,) * length) for n, length in enumerate(lengths)]
    writer.append(packed(content))
    samples = Samples([TokenTable(_closed(writer, folder), None)])
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(lengths)))) | {0, len(lengths)})
    held = ahead.Ahead(samples, order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "HELD_BYTES", data.draw(st.integers(1, 4000)))
        patch.setattr(ahead, "GAP_BYTES", data.draw(st.integers(0, 400)))
        patch.setattr(ahead, "READ_BYTES", data.draw(st.integers(1, 1000)))
        for start, stop in pairwise(cuts):
            found = held.taken(start, stop)
            assert [(one.tokens, one.trained) for one in found] == [
                (content[n].tokens, content[n].trained) for n in order[start:stop].tolist()
            ]


def _on_disk(folder: Path, count: int) -> TokenTable:
    folder.mkdir()
    samples = [EncodedSample(tuple(range(n % 40 + 1)), (True,) * (n % 40 + 1)) for n in range(count)]
    writer = TableWriter(folder)
    writer.append(packed(samples))
    return TokenTable(_closed(writer, folder), str(folder))


def test_labels_are_a_part_of_what_data_are() -> None:
    """A run must not go on with other labels; but one answer with both is one answer, for splits."""
    tokens, trained = tuple(range(9)), (False,) * 4 + (True,) * 5
    digests, keys = set(), set()
    for labels in ((True, False), (False, True), (None, None)):
        samples = Samples.of([EncodedSample(tokens, trained, label=label) for label in labels])
        assert samples.labels().tolist() == [{None: 0, False: 1, True: 2}[label] for label in labels]
        digests.add(samples.digest())
        one, other = samples.keys()
        keys.add((*one.tolist(), *other.tolist()))
    assert len(digests) == 3
    assert len(keys) == 1


def test_labels_of_many_samples_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "_LABELS_AT_ONCE", 7)
    labels = [(None, False, True)[n % 3] for n in range(25)]
    writer = TableWriter(tmp_path)
    writer.append(packed([EncodedSample((1, 2), (False, True), label=label) for label in labels]))
    table = TokenTable(_closed(writer, tmp_path), "a.jsonl")
    assert table.labels().tolist() == [{None: 0, False: 1, True: 2}[label] for label in labels]
