"""Files on disk in, records with their places out; one at a time, so that a file may be larger than memory."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

from fitune.data import columnar_records, json_records
from fitune.data.file_lines import COMPRESSED, RECORD_BYTES
from fitune.data.record import Problems, Record
from fitune.data.table_records import table_records
from fitune.data.text_records import text_records
from fitune.errors import InputError

Reader = Callable[[Path, Problems], Iterator[Record]]

_TEXTS: dict[str, Reader] = {
    ".jsonl": json_records.line_records,
    ".ndjson": json_records.line_records,
    ".csv": table_records,
    ".tsv": table_records,
    ".txt": text_records,
}
_COLUMNS: dict[str, Reader] = {
    ".parquet": columnar_records.parquet_records,
    ".arrow": columnar_records.arrow_records,
}
# Those whose bytes may be compressed as a whole.
PLAIN = (".json", *_TEXTS)
SUFFIXES = (*PLAIN, *_COLUMNS)


def stream_records(path: str | Path, problems: Problems) -> Iterator[Record]:
    """The records of a file, in order; what is wrong with single ones goes to `problems`.

    A list in a .json file, a line of a .jsonl or .ndjson file, a row of a .csv, .tsv, .parquet or .arrow file or of a
    folder that `datasets` saved, and of a .txt file {"text": ...} of its blocks between blank lines (or its lines).
    All but .parquet and .arrow also with .gz or .zst.

    Raises:
        InputError: the file is missing, a folder, empty, of an unknown kind, or cannot be read as a whole.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind in _COLUMNS:
        problems.unit = "row"
        reader = _COLUMNS[kind]
    else:
        reader = _json_reader(path) if kind == ".json" else _TEXTS[kind]
        if kind != ".txt" and not json_records.first_character(path):
            raise InputError("the file is empty; it must hold at least one sample", where=path)
    found = False
    for record in reader(path, problems):
        found = True
        yield record
    if problems.count and kind == ".json" and _is_one_object(path, reader):
        raise InputError(
            "the file is one JSON object; it must be a list of samples, or one sample a line", where=path
        )
    if not found and not problems.count:
        what = "list is empty" if reader is json_records.list_records else "file is empty"
        raise InputError(f"the {what}; it must hold at least one sample", where=path)


def read_records(path: str | Path) -> list[Record]:
    """All records of a file. Raises InputError as `stream_records`, and for every record that is broken."""
    problems = Problems(str(path))
    records = list(stream_records(path, problems))
    problems.raise_if_any()
    return records


def kind_of(path: Path) -> str:
    """The file's suffix without that of its compression; of a folder that `datasets` saved ".arrow".

    Raises:
        InputError: there is no such file, it is another folder, or no file of data by its suffix.
    """
    if path.is_dir():
        if columnar_records.is_saved_by_datasets(path):
            return ".arrow"
        raise InputError("this is a folder; name a file in it, or a folder that `datasets` saved", where=path)
    if not path.exists():
        raise InputError(f"no such file{_near(path)}", where=path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSED else (suffixes or [""])[-1]
    if kind not in SUFFIXES or (kind in _COLUMNS and suffixes[-1] in COMPRESSED):
        raise InputError(
            f"unknown kind of data file {''.join(suffixes[-2:]) or '(no suffix)'}; known: {', '.join(PLAIN)}, each "
            f"also with {' or '.join(COMPRESSED)}, and {', '.join(_COLUMNS)}",
            where=path,
        )
    return kind


def _json_reader(path: Path) -> Reader:
    return json_records.list_records if json_records.first_character(path) == "[" else json_records.line_records


def _is_one_object(path: Path, reader: Reader) -> bool:
    return (
        reader is json_records.line_records
        and path.stat().st_size <= RECORD_BYTES
        and json_records.is_one_value(path)
    )


def _near(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
