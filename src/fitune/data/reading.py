"""A data file in, samples out: reads the records, names their one format, converts every one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from fitune.data.columns import check_columns, map_columns
from fitune.data.conversation import Origin, Sample
from fitune.data.fields import RecordError, kind_of_value
from fitune.data.formats import FIELDS, FORMATS, convert, recognise
from fitune.data.record import Problems
from fitune.data.sources import stream_records
from fitune.errors import InputError


class SampleReader:
    """The samples of one file, in order, one at a time; what is wrong with single ones is collected.

    Args:
        path: a file or folder as `sources.stream_records` takes it.
        format: a name from `formats.FORMATS`, or "auto": recognised from the first record's keys.
        columns: renames keys before anything else: {key in the file: key of the format}.
        instruction: for records of alpaca's kind that have none.

    Attributes:
        format: the name of the format; "auto" until the first record is read.
        problems: what does not fit, with its line.

    Raises InputError for a format or columns that do not exist.
    """

    def __init__(
        self, path: str | Path, format: str = "auto", columns: Mapping[str, str] | None = None, instruction: str = ""
    ) -> None:
        self.path, self.format = str(path), format
        self._columns = dict(columns or {})
        self._instruction = instruction
        check_columns(self._columns, FIELDS)
        if format != "auto" and format not in FORMATS:
            raise InputError(f"no such format {format!r}; known: auto, {', '.join(FORMATS)}", where=path)
        self.problems = Problems(self.path)

    def __iter__(self) -> Iterator[Sample]:
        """Once. Raises InputError where the file cannot be read as a whole."""
        settled = 0 if self.format == "auto" else -1  # the line that settled the format
        for record in stream_records(self.path, self.problems):
            if not isinstance(record.value, dict):
                found = kind_of_value(record.value)
                self.problems.add(record.line, f"a sample must be an object, found {found}")
                continue
            try:
                value = map_columns(record.value, self._columns)
                if self._instruction:
                    value = {**value, "instruction": value.get("instruction") or self._instruction}
                if settled >= 0:
                    name = recognise(value)
                    if self.format == "auto":
                        self.format, settled = name, record.line
                    elif name != self.format:
                        raise RecordError(
                            f"this sample has the format {name}, but the one in {self.problems.unit} {settled} has "
                            f"{self.format}; a file must have one format"
                        )
                origin = Origin(self.path, record.line, self.problems.unit)
                yield convert(value, self.format, origin)
            except RecordError as error:
                self.problems.add(record.line, str(error))


def read_samples(
    path: str | Path, format: str = "auto", columns: Mapping[str, str] | None = None, instruction: str = ""
) -> list[Sample]:
    """Every sample of one file, in order, each with its file and line. Arguments as `SampleReader`.

    Raises:
        InputError: the file cannot be read; its records have no known format, several, or different ones; or
            records do not fit it. Every bad record is named with its line (the first 20, then a count).
    """
    samples, _ = read_with_format(path, format, columns, instruction)
    return samples


def detect_format(path: str | Path, columns: Mapping[str, str] | None = None) -> str:
    """The name of the format that all records of the file have.

    Raises:
        InputError: as `read_samples`.
    """
    _, name = read_with_format(path, "auto", columns)
    return name


def read_with_format(
    path: str | Path, format: str = "auto", columns: Mapping[str, str] | None = None, instruction: str = ""
) -> tuple[list[Sample], str]:
    """As `read_samples`, with the name of the format."""
    reader = SampleReader(path, format, columns, instruction)
    samples = list(reader)
    reader.problems.raise_if_any()
    return samples, reader.format
