"""Every kind of data file, against what independent writers wrote."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fitune.data import read_samples
from fitune.data.file_lines import EXPANDED_FREELY, RECORD_BYTES
from fitune.data.record import Problems
from fitune.data.sources import kind_of, read_records, stream_records
from fitune.errors import InputError

RECORDS = [{"question": f"Frage {n}, „äöü“ 漢字?", "answer": f"Antwort\n{n};|\t", "id": str(n)} for n in range(3)]


def write_csv(path: Path, delimiter: str, **options: Any) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(RECORDS[0]), delimiter=delimiter, **options)
        writer.writeheader()
        writer.writerows(RECORDS)
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_csv_is_read_as_the_csv_module_wrote_it(tmp_path: Path, delimiter: str, quoting: Any) -> None:
    path = write_csv(tmp_path / "a.csv", delimiter, quoting=quoting)
    assert [record.value for record in read_records(path)] == RECORDS
    assert [record.line for record in read_records(path)] == [2, 4, 6]  # cells have line ends
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [record.value for record in read_records(path)] == RECORDS


def test_tsv_has_tabs_whatever_else_is_in_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("question\tanswer\tan,other\nq\ta\tx\n", encoding="utf-8")
    assert read_records(path)[0].value == {"question": "q", "answer": "a", "an,other": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2,3\n4,5\n", r"line 2: 3 cells, but the first row names 2 columns"),
        ("a,b;c\n", "can be parted by a comma or a semicolon"),
        ("a,,c\n1,2,3\n", "column 2 of the first row has no name"),
        ("a,b,a\n1,2,3\n", "names the column 'a' twice"),
        ('a,b\n1,"2\n', "line 2: not valid CSV"),
        ("a,b\n", "the file is empty"),
        ("", "the file is empty"),
    ],
)
def test_tables_that_are_none_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_records(path)


def test_parquet_and_arrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    nested = [{**record, "messages": [{"role": "user", "content": "a"}], "none": None} for record in RECORDS] * 300
    table = pyarrow.Table.from_pylist(nested)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    found = read_records(tmp_path / "a.parquet")
    assert [record.value for record in found] == nested
    assert [record.line for record in found] == list(range(1, 901))
    for name, opened in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with opened(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=250)
        assert [record.value for record in read_records(tmp_path / f"{name}.arrow")] == nested
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-200])
    (tmp_path / "torn.arrow").write_bytes(b"ARROW1\0\0" + b"x" * 50)
    for name in ("torn.parquet", "torn.arrow"):
        with pytest.raises(InputError, match="cannot be read as"):
            read_records(tmp_path / name)


def test_a_row_that_does_not_fit_is_named_as_a_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    records = [{"question": "q", "answer": "a"}, {"question": "", "answer": "b"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r'row 2: "question" is empty'):
        read_samples(tmp_path / "a.parquet")


def saved(folder: Path, files: list[str], **state: Any) -> Path:
    """A folder as `datasets` writes it (its save_to_disk)."""
    import pyarrow

    folder.mkdir()
    for name in files:
        table = pyarrow.Table.from_pylist([{"text": f"{name} {n}"} for n in range(4)])
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in files], "_indices_data_files": None, **state}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    return folder


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    folder = saved(tmp_path / "one", names)
    found = read_records(folder)
    assert [record.value["text"] for record in found] == [f"{name} {n}" for name in names for n in range(4)]
    assert [record.line for record in found] == list(range(1, 9))
    (folder / names[1]).unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00002\.arrow is missing"):
        read_records(folder)
    with pytest.raises(InputError, match="flatten_indices"):
        read_records(saved(tmp_path / "picked", names[:1], _indices_data_files=[{"filename": "i.arrow"}]))
    both = tmp_path / "both"
    both.mkdir()
    (both / "dataset_dict.json").write_text('{"splits": ["train"]}', encoding="utf-8")
    saved(both / "train", names[:1])
    with pytest.raises(InputError, match=r"several splits \(train\); name one, such as .*both/train"):
        read_records(both)
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="this is a folder"):
        kind_of(tmp_path / "plain")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed(tmp_path: Path, suffix: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    text = "\n".join(map(json.dumps, RECORDS)).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(text))
    assert [record.value for record in read_records(path)] == RECORDS
    path.write_bytes(compress(text[:70]) + compress(text[70:]))  # as `cat` joins them
    assert [record.value for record in read_records(path)] == RECORDS
    path.write_bytes(compress(text)[:-6])
    with pytest.raises(InputError, match="cut short"):
        read_records(path)
    whole = bytearray(compress(b"x" * 100_000))
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"damaged|cut short|not valid JSON|more than"):
        read_records(path)
    path.write_bytes(b"plain")
    with pytest.raises(InputError, match=r"the name ends in \.(gz|zst) but the file is not"):
        read_records(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_takes_no_memory_and_is_refused(tmp_path: Path, suffix: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    size = EXPANDED_FREELY + (16 << 20)
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix == ".gz":
        with gzip.open(path, "wb") as file:
            for _ in range(size >> 20):
                file.write(b"\n" * (1 << 20))
    else:
        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as packed:
            for _ in range(size >> 20):
                packed.write(b"\n" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(InputError, match="more than 300 times its size"):
        list(stream_records(path, Problems(str(path))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 << 20


def test_a_line_without_end_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range((RECORD_BYTES >> 20) + 8):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "b"}\n')
    problems = Problems(str(path))
    assert [record.value for record in stream_records(path, problems)] == [{"text": "a"}, {"text": "b"}]
    assert problems.shown == ["line 2: a line of more than 64 MiB"]


def test_a_file_is_read_a_little_at_a_time(tmp_path: Path) -> None:
    for name, start, between, end in (("a.json", "[", ",\n", "]"), ("a.jsonl", "", "\n", "\n")):
        path = tmp_path / name
        with path.open("w", encoding="utf-8") as file:
            file.write(start)
            for number in range(40_000):
                file.write((between if number else "") + json.dumps({"text": f"{number} " + "word " * 200}))
            file.write(end)
        tracemalloc.start()
        count = sum(1 for _ in stream_records(path, Problems(str(path))))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == 40_000
        assert path.stat().st_size > 40_000_000
        assert peak < 12_000_000, name


def test_what_json_does_not_have_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": NaN}\n{"text": "b"}', encoding="utf-8")
    with pytest.raises(InputError, match="line 1: not valid JSON: NaN is not a number that JSON has"):
        read_records(path)


def test_values_that_end_where_a_block_ends(tmp_path: Path) -> None:
    """Lists are read in blocks of a MiB; a value may be cut anywhere."""
    for shift in (0, 1, 2, 3, 7):
        texts = ["x" * ((1 << 20) - 30 + shift), "é" * 600_000, "end"]
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False), encoding="utf-8")
        assert [record.value["text"] for record in read_records(path)] == texts
