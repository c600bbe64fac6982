"""CSV and TSV in, records with their lines out: the first row names the columns, every cell is text."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fitune.data.file_lines import RECORD_BYTES, lines, not_utf8
from fitune.data.record import Problems, Record
from fitune.errors import InputError

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}


def table_records(path: Path, problems: Problems) -> Iterator[Record]:
    """A record of every row under the first one.

    Cells are parted by what parts the names of the first row (.tsv: tabs), quoted with `"`, doubled inside.

    Raises:
        InputError: the first row cannot be read, names a column twice or not at all, or could be parted in two ways.
    """
    csv.field_size_limit(RECORD_BYTES)
    header = next((raw for _, raw in lines(path) if raw.strip()), b"")
    delimiter = "\t" if ".tsv" in path.suffixes[-2:] else _delimiter(header, path)
    source = _Lines(path, problems)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        start = source.line + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # What follows belongs to a cell that may never end.
            problems.add(start, f"not valid CSV: {error}; reading stopped there")
            return
        if not cells:
            continue
        if names is None:
            names = _names(cells, path)
        elif len(cells) != len(names):
            problems.add(start, f"{len(cells)} cells, but the first row names {len(names)} columns")
        else:
            yield Record(start, dict(zip(names, cells, strict=True)))


class _Lines:
    """Lines as the csv module takes them; `line` is the number of the last one it took."""

    def __init__(self, path: Path, problems: Problems) -> None:
        self.line = 0
        self._lines = lines(path)
        self._problems = problems

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        for number, raw in self._lines:
            self.line = number
            try:
                return raw.decode("utf-8").removesuffix("\r") + "\n"
            except UnicodeDecodeError as error:
                self._problems.add(number, not_utf8(error))
        raise StopIteration


def _delimiter(header: bytes, path: Path) -> str:
    text = header.decode("utf-8", "replace").strip("\r")
    found = {mark: _cells(text, mark) for mark in DELIMITERS}
    parting = [mark for mark, cells in found.items() if len(cells) > 1]
    if len(parting) > 1:
        named = " or ".join(DELIMITERS[mark] for mark in parting)
        raise InputError(
            f"the first row can be parted by {named}: {text[:80]!r}; name the columns without these signs, or save "
            "the file with one of them only",
            where=path,
        )
    return parting[0] if parting else ","


def _cells(text: str, delimiter: str) -> Sequence[str]:
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _names(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not all(names):
        raise InputError(f"column {names.index('') + 1} of the first row has no name", where=path)
    if len(set(names)) < len(names):
        seen: set[Any] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InputError(f"the first row names the column {twice!r} twice", where=path)
    return names
