"""A data file in, samples out: reads the records, names their one format, converts every one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fitune.data.conversation import Origin, Sample
from fitune.data.formats import (
    FORMATS,
    TRAINABLE,
    RecordError,
    check_columns,
    convert,
    known_formats,
    map_columns,
    recognise,
)
from fitune.data.sources import Problems, Record, read_records
from fitune.errors import InputError


def read_samples(path: str | Path, format: str = "auto", columns: Mapping[str, str] | None = None) -> list[Sample]:
    """Every sample of one file, in order, each with its file and line.

    Args:
        path: a .json, .jsonl, .ndjson or .txt file, also .gz.
        format: a name from `formats.FORMATS`, or "auto": recognised from the keys.
        columns: renames keys before anything else: {key in the file: key of the format}.

    Raises:
        InputError: the file cannot be read; its records have no known format, several, or different ones; or
            records do not fit it. Every bad record is named with its line (the first 20, then a count).
    """
    samples, _ = read_with_format(path, format, columns)
    return samples


def detect_format(path: str | Path, columns: Mapping[str, str] | None = None) -> str:
    """The name of the format that all records of the file have.

    Raises:
        InputError: as `read_samples`, except that records need not be complete.
    """
    columns = dict(columns or {})
    check_columns(columns)
    problems = Problems(str(path))
    _, name = _named(read_records(path), "auto", columns, problems)
    problems.raise_if_any()
    return name


def read_with_format(
    path: str | Path, format: str = "auto", columns: Mapping[str, str] | None = None
) -> tuple[list[Sample], str]:
    """As `read_samples`, with the name of the format."""
    columns = dict(columns or {})
    check_columns(columns)
    if format != "auto" and format not in TRAINABLE:
        refusal = FORMATS[format].refusal if format in FORMATS else f"no such format {format!r}"
        raise InputError(f"{refusal}; known: auto, {', '.join(TRAINABLE)}", where=path)
    problems = Problems(str(path))
    records, name = _named(read_records(path), format, columns, problems)
    samples = []
    for record in records:
        try:
            samples.append(convert(record.value, name, Origin(str(path), record.line)))
        except RecordError as error:
            problems.add(record.line, str(error))
    problems.raise_if_any()
    return samples, name


def _named(
    records: list[Record], format: str, columns: Mapping[str, str], problems: Problems
) -> tuple[list[Record], str]:
    """The records with their keys renamed, and the one format of all; what does not fit goes to `problems`."""
    renamed: list[Record] = []
    name, first_line = format, 0
    for record in records:
        if not isinstance(record.value, dict):
            problems.add(record.line, f"a sample must be an object, found {type(record.value).__name__}")
            continue
        try:
            value = map_columns(record.value, columns)
            if format == "auto":
                found = recognise(value)
                if FORMATS[found].convert is None:
                    raise InputError(f"{FORMATS[found].refusal}; known: {known_formats()}", where=problems.where)
                if name == "auto":
                    name, first_line = found, record.line
                elif found != name:
                    raise RecordError(
                        f"this sample has the format {found}, but the one in line {first_line} has {name}; "
                        "a file must have one format"
                    )
        except RecordError as error:
            problems.add(record.line, str(error))
            continue
        renamed.append(Record(record.line, value))
    return renamed, name
