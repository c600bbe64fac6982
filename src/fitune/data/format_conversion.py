"""A data file in one format in, the same samples in another format out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fitune.data.conversation import Message, Origin, Sample
from fitune.data.fields import RecordError
from fitune.data.formats import FORMATS
from fitune.data.reading import SampleReader
from fitune.data.record import Problems
from fitune.data.record_writing import record_of, write_records, written_kind
from fitune.data.text_records import decoded_lines
from fitune.errors import InputError


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did: format and file of both sides, and how many samples."""

    source: str
    found: str
    target: str
    format: str
    samples: int


def convert_file(
    source: Path, target: Path, format: str, found: str = "auto", columns: Mapping[str, str] | None = None,
    instruction: str = "", answers: Path | None = None,
) -> Converted:  # fmt: skip
    """Writes the samples of `source` to `target` in another format. Nothing of a sample is lost: else it is refused.

    Args:
        found: the format of `source`, its `columns` and `instruction`, as `SampleReader` takes them.
        answers: a second text file, line by line the answers to the lines of `source` (translations).

    Raises:
        InputError: either file cannot be read or written, or samples do not fit (named with their lines).
    """
    if format not in FORMATS:
        raise InputError(f"no such format {format!r}; known: {', '.join(FORMATS)}")
    written_kind(target)
    if target.exists():
        raise InputError("there is such a file already; name another, or remove it", where=target)
    problems = Problems(str(source))
    if answers is not None:
        if columns or found not in ("auto", "text"):
            raise InputError("--answers takes two files of lines; they have no columns and no format")
        samples: Iterator[Sample] = _pairs(source, answers, instruction, problems)
        reader = None
    else:
        reader = SampleReader(source, found, columns, instruction)
        samples, problems = iter(reader), reader.problems

    def records() -> Iterator[dict[str, Any]]:
        for sample in samples:
            assert sample.origin is not None
            try:
                record = record_of(sample, format)
            except RecordError as error:
                problems.add(sample.origin.line, str(error))
                continue
            if not problems.count:  # else nothing is written in the end
                yield record
        problems.raise_if_any()

    count = write_records(target, records())
    return Converted(str(source), reader.format if reader else "lines", str(target), format, count)


def _pairs(questions: Path, answers: Path, instruction: str, problems: Problems) -> Iterator[Sample]:
    other = Problems(str(answers))
    both = zip_longest(decoded_lines(questions, problems), decoded_lines(answers, other))
    for number, pair in enumerate(both, 1):
        if problems.count or other.count:  # a line is missing, and those after it are not of each other
            break
        if pair[0] is None or pair[1] is None:
            longer = questions if pair[1] is None else answers
            raise InputError(f"line {number}: only {longer} goes on; both files must have the same lines")
        question, answer = pair[0][1].strip(), pair[1][1].strip()
        if not question or not answer:
            problems.add(number, "a line without its partner: " + ("the answer" if question else "it") + " is empty")
            continue
        asked = f"{instruction}\n{question}" if instruction else question
        yield Sample((Message("user", asked), Message("assistant", answer)), origin=Origin(str(questions), number))
    problems.raise_if_any()
    other.raise_if_any()
