"""Plain text in, documents with their lines out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fitune.data.file_lines import RECORD_BYTES, lines, not_utf8
from fitune.data.record import Problems, Record


def text_records(path: Path, problems: Problems) -> Iterator[Record]:
    """{"text": ...} of every block between blank lines or, where there are no blank lines, of every line."""
    if not _has_blank_lines(path):
        for number, line in decoded_lines(path, problems):
            if line.strip():
                yield Record(number, {"text": line})
        return
    start, size = 1, 0
    block: list[str] = []
    for number, line in decoded_lines(path, problems):
        if not line.strip():
            if block:
                yield Record(start, {"text": "\n".join(block)})
            block, size = [], 0
            continue
        if not block:
            start = number
        block.append(line)
        size += len(line) + 1
        if size > RECORD_BYTES:
            problems.add(start, f"a document of more than {RECORD_BYTES >> 20} MiB; part it with blank lines")
            block, size = [], 0
    if block:
        yield Record(start, {"text": "\n".join(block)})


def decoded_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Every line and its number; those that cannot be read go to `problems`."""
    for number, raw in lines(path):
        if len(raw) > RECORD_BYTES:
            problems.add(number, f"a line of more than {RECORD_BYTES >> 20} MiB")
            continue
        try:
            yield number, raw.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            problems.add(number, not_utf8(error))


def _has_blank_lines(path: Path) -> bool:
    """Between others; those at the ends part nothing."""
    seen_text = seen_blank = False
    for _, raw in lines(path):
        if raw.strip():
            if seen_blank:
                return True
            seen_text = True
        elif seen_text:
            seen_blank = True
    return False
