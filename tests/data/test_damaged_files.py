"""Files damaged in every way: each is read, or refused in a sentence; never a traceback, a hang, or a lost line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitune.data.reading import SampleReader
from fitune.data.record_writing import write_records
from fitune.errors import InputError

SECONDS = 20.0  # a file of a few hundred kilobytes takes milliseconds; a hang takes for ever
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
RECORDS: list[dict[str, Any]] = [
    {"instruction": "add", "input": "1 2", "output": "3", "history": [["q", "a"]], "system": "s"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
    {"messages": [*TURNS[:1], CALL, {"role": "tool", "content": "7"}, TURNS[1]], "tools": []},
    {"prompt": "q", "completion": "a"},
    {"question": "q", "answer": "ä „ö“ 漢字"},
    {"text": "plain\ntext"},
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": "b"},
    {"messages": TURNS, "label": True},
]
ODD: list[Any] = [
    None, True, 0, -1.5, 10**30, "", "x", [], {}, [[]], [None], {"a": None}, [{}], "\ud800", "\x00", "x" * 300_000,
    {"role": "user"}, [{"role": "user", "content": [{"type": "image"}]}], [{"from": 1, "value": 2}],
    {f"k{n}": n for n in range(3000)},
]  # fmt: skip
BYTES = [
    b"\xff", b"\xc3(", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"[" * 5000, b"{",
    b"}", b"]", b",", b'"', b"\\", b"\n", b"\r\n", b"\r", b"\n\n", b"NaN", b"1e999", b"\xe2\x80\xa8",
    b'{"a":' * 3000,
    b"x" * 200_000, b";" * 20_000,
]  # fmt: skip
KINDS = [".json", ".jsonl", ".csv", ".tsv", ".txt", ".jsonl.gz", ".json.gz", ".csv.gz", ".txt.gz", ".jsonl.zst"]


def written(kind: str, records: list[Any]) -> bytes:
    if kind.startswith(".txt"):
        return "\n\n".join(str(record) for record in records).encode("utf-8", "surrogatepass")
    if kind.startswith((".csv", ".tsv")):
        text = io.StringIO(newline="")
        names = list(dict.fromkeys(key for record in records if isinstance(record, dict) for key in record))
        writer = csv.DictWriter(text, names, delimiter="," if "csv" in kind else "\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(record for record in records if isinstance(record, dict))
        return text.getvalue().encode("utf-8", "surrogatepass")
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    joined = "[" + ",\n".join(texts) + "]" if kind.startswith(".json") and "jsonl" not in kind else "\n".join(texts)
    return joined.encode("utf-8", "surrogatepass")


def packed(kind: str, raw: bytes) -> bytes:
    if kind.endswith(".gz"):
        return gzip.compress(raw, 1)
    if kind.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        return bytes(zstandard.ZstdCompressor(1).compress(raw))
    return raw


@st.composite
def damaged(draw: Any) -> tuple[str, bytes]:
    """The name of a file and its bytes: good records, some of them spoiled, and the bytes spoiled again."""
    kind = draw(st.sampled_from(KINDS))
    record = draw(st.sampled_from(RECORDS))
    records: list[Any] = [record] * draw(st.integers(1, 4))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(records) - 1))
        spoiled = json.loads(json.dumps(records[place]))
        where: Any = spoiled
        path = draw(st.lists(st.integers(0, 5), max_size=4))
        for step in path[:-1]:
            inner = list(where.values()) if isinstance(where, dict) else where if isinstance(where, list) else []
            if not inner or not isinstance(inner[step % len(inner)], dict | list):
                break
            where = inner[step % len(inner)]
        odd = draw(st.sampled_from(ODD))
        if not path:
            spoiled = odd
        elif isinstance(where, dict) and where:
            key = list(where)[path[-1] % len(where)]
            if draw(st.booleans()):
                where[key] = odd
            else:
                del where[key]
        elif isinstance(where, list) and where:
            where[path[-1] % len(where)] = odd
        records[place] = spoiled
    raw = written(kind, records)
    if draw(st.booleans()):
        raw = spoil(draw, raw)
    raw = packed(kind, raw)
    if draw(st.integers(0, 4)) == 0:
        raw = spoil(draw, raw)
    return f"data{kind}", raw


def spoil(draw: Any, raw: bytes) -> bytes:
    at = draw(st.integers(0, len(raw)))
    how = draw(st.sampled_from(["cut", "insert", "replace", "twice", "lose"]))
    if how == "cut":
        return raw[:at]
    if how == "insert":
        return raw[:at] + draw(st.sampled_from(BYTES)) + raw[at:]
    if how == "replace":
        return raw[:at] + draw(st.binary(min_size=1, max_size=3)) + raw[at + 2 :]
    return raw + raw[at:] if how == "twice" else raw[:at] + raw[at + draw(st.integers(1, 9)) :]


def lines_of(name: str, raw: bytes) -> int | None:
    """How many lines of JSON Lines must be accounted for; None: it is another kind, or cannot be unpacked."""
    if ".jsonl" not in name:
        return None
    try:
        text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except Exception:
        return None
    if raw[:4] == b"\x28\xb5\x2f\xfd":
        return None
    text = text.removeprefix(b"\xef\xbb\xbf")
    return sum(bool(line.strip(b" \t\r")) for line in text.split(b"\n"))


def check(folder: Path, name: str, raw: bytes) -> str:
    """Reads it; what came of it, in a word."""
    path = folder / name
    path.write_bytes(raw)
    started = time.perf_counter()
    reader = SampleReader(path)
    try:
        samples = list(reader)
    except InputError as error:
        said = str(error)
    else:
        said = ""
    outcome = "refused"
    if said:
        assert len(said) < 20_000
    else:
        lines = lines_of(name, raw)
        if lines is not None:
            assert len(samples) + reader.problems.count == lines, (name, raw[:200])
        outcome = "read" if not reader.problems.count else "named"
        assert samples or reader.problems.count
        assert all(len(shown) < 5_000 for shown in reader.problems.shown)
    assert time.perf_counter() - started < SECONDS
    return outcome


QUICK = int(os.environ.get("FITUNE_FUZZ_FILES", "400"))


@settings(max_examples=QUICK, suppress_health_check=list(HealthCheck), deadline=None, derandomize=True)
@given(file=damaged())
def test_damaged_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes]) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    check(folder, *file)


@pytest.mark.slow
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck), deadline=None, derandomize=True)
@given(file=damaged())
def test_ten_thousand_damaged_files(tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes]) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    check(folder, *file)


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None, derandomize=True)
@given(kind=st.sampled_from([".parquet", ".arrow"]), data=st.data())
def test_damaged_tables_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    good = folder / f"good{kind}"
    if kind == ".parquet":
        write_records(good, [{"question": "q", "answer": str(n)} for n in range(50)])
    else:
        table = pyarrow.Table.from_pylist([{"question": "q", "answer": str(n)} for n in range(50)])
        with pyarrow.ipc.new_stream(str(good), table.schema) as writer:
            writer.write_table(table)
    raw = spoil(data.draw, good.read_bytes())
    check(folder, f"spoiled{kind}", raw)


def test_a_million_columns(tmp_path: Path) -> None:
    names = ",".join(f"c{n}" for n in range(1_000_000))
    path = tmp_path / "wide.csv"
    path.write_text(f"{names}\n{names}\n", encoding="utf-8")
    reader = SampleReader(path)
    assert list(reader) == []
    assert reader.problems.count == 1
    assert "and 999,980 more" in reader.problems.shown[0]
    assert len(reader.problems.shown[0]) < 2_000
    wide = tmp_path / "wide.jsonl"
    wide.write_text(json.dumps({f"c{n}": None for n in range(1_000_000)}), encoding="utf-8")
    assert check(tmp_path, "wide.jsonl", wide.read_bytes()) == "named"
