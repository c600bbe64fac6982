"""Files on disk in, records with their line numbers out: JSON arrays, JSON Lines and plain text, also gzipped."""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fitune.errors import InputError

SHOWN_PROBLEMS = 20
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *JSON_LINES_SUFFIXES, ".txt")


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file and the line it starts on, counted from 1."""

    line: int
    value: Any


@dataclass(slots=True)
class Problems:
    """What is wrong in one file: the first `SHOWN_PROBLEMS` in words, the rest as a count."""

    where: str
    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, message: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(f"line {line}: {message}")

    def raise_if_any(self) -> None:
        """Raises InputError with every problem collected so far."""
        if self.count:
            more = self.count - len(self.shown)
            raise InputError([*self.shown, *([f"and {more} more"] if more else [])], where=self.where)


def read_records(path: str | Path) -> list[Record]:
    """All records of a .json, .jsonl, .ndjson or .txt file (each also .gz), in order.

    A .txt file yields {"text": ...} records: its blocks between blank lines or, where it has no blank lines,
    its lines.

    Raises:
        InputError: the file is missing, a folder, empty, of an unknown kind, not UTF-8, or has broken records
            (all of them are named, up to `SHOWN_PROBLEMS`, with their lines).
    """
    path = Path(path)
    kind = _kind(path)
    text = _read_text(path)
    if not text.strip():
        raise InputError("the file is empty; it must hold at least one sample", where=path)
    problems = Problems(str(path))
    if kind == ".txt":
        records = list(_documents(text))
    elif kind == ".json" and text.lstrip()[0] == "[":
        records = list(_array(text, problems))
    else:
        records = list(_json_lines(text, problems))
        if problems.count and kind == ".json" and _is_one_json_value(text):
            raise InputError(
                "the file is one JSON object; it must be a list of samples, or one sample a line", where=path
            )
    problems.raise_if_any()
    if not records:
        raise InputError("the list is empty; it must hold at least one sample", where=path)
    return records


def _kind(path: Path) -> str:
    if path.is_dir():
        raise InputError("this is a folder; name a file in it", where=path)
    if not path.exists():
        raise InputError(f"no such file{_near(path)}", where=path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]
    if kind not in SUFFIXES:
        raise InputError(
            f"unknown kind of data file {kind or '(no suffix)'}; known: {', '.join(SUFFIXES)}, each also with .gz",
            where=path,
        )
    return kind


def _near(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif path.suffix.lower() == ".gz":
            raise InputError("the name ends in .gz but the file is not gzip", where=path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"the gzip file is cut short or damaged ({error})", where=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=path) from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError("the file is UTF-16; save it as UTF-8", where=path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig reports offsets into what follows the mark.
        body = data[3:] if data.startswith(b"\xef\xbb\xbf") else data
        line = body.count(b"\n", 0, error.start) + 1
        found = " ".join(f"{byte:02x}" for byte in body[error.start : error.end])
        raise InputError(f"line {line}: not UTF-8 (byte {found}); save it as UTF-8", where=path) from None


def _documents(text: str) -> Iterator[Record]:
    lines = text.replace("\r\n", "\n").split("\n")
    body = text.strip().replace("\r\n", "\n")
    if not any(not line.strip() for line in body.split("\n")):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Record(number, {"text": line})
        return
    start = 1
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            if not block:
                start = number
            block.append(line)
        elif block:
            yield Record(start, {"text": "\n".join(block)})
            block = []


def _array(text: str, problems: Problems) -> Iterator[Record]:
    decode = _Decoder()
    position = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    expect_value = False  # after a comma
    while True:
        line, counted = line + text.count("\n", counted, position), position
        if position >= len(text):
            problems.add(line, "the file ends inside the list; it was cut short")
            return
        if text[position] == "]" and not expect_value:
            break
        result = _decode_at(decode, text, position)
        if isinstance(result, str):
            # Beyond a syntax error nothing says where the next sample begins.
            problems.add(line, f"the sample that starts here is broken: {result}; reading stopped there")
            return
        value, end = result
        if decode.repeated is not None:
            problems.add(line, f"the key {decode.repeated!r} occurs twice in one object")
        else:
            yield Record(line, value)
        position = _skip_space(text, end)
        expect_value = position < len(text) and text[position] == ","
        if expect_value:
            position = _skip_space(text, position + 1)
            if position < len(text) and text[position] == "]":
                line += text.count("\n", counted, position)
                problems.add(line, "a comma before the closing bracket of the list")
                return
        elif position < len(text) and text[position] != "]":
            line += text.count("\n", counted, position)
            problems.add(line, f"expected a comma or ] after a sample, found {text[position : position + 20]!r}")
            return
    rest = text[position + 1 :]
    if rest.strip():
        line += text.count("\n", counted, _skip_space(text, position + 1))
        problems.add(line, f"text after the end of the list: {rest.strip()[:20]!r}")


def _json_lines(text: str, problems: Problems) -> Iterator[Record]:
    decode = _Decoder()
    # Only "\n" ends a line: U+2028 and others that str.splitlines knows may stand inside JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip(" \t\r")
        if not stripped:
            continue
        result = _decode_at(decode, stripped, 0)
        if isinstance(result, str):
            problems.add(number, f"not valid JSON: {result}")
            continue
        value, end = result
        if decode.repeated is not None:
            problems.add(number, f"the key {decode.repeated!r} occurs twice in one object")
        elif stripped[end:].strip():
            problems.add(number, f"text after the end of the object: {stripped[end:].strip()[:20]!r}")
        else:
            yield Record(number, value)


class _Decoder:
    """A JSON decoder that notes keys which occur twice in one object, where Python's would keep the last."""

    def __init__(self) -> None:
        self.repeated: str | None = None
        self._raw_decode = json.JSONDecoder(object_pairs_hook=self._unique).raw_decode

    def __call__(self, text: str, position: int) -> tuple[Any, int]:
        self.repeated = None
        return self._raw_decode(text, position)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            keys = [key for key, _ in pairs]
            self.repeated = next(key for key in keys if keys.count(key) > 1)
        return record


def _decode_at(decode: _Decoder, text: str, position: int) -> tuple[Any, int] | str:
    """The value at `position` and where it ends, or a sentence that says why there is none."""
    try:
        return decode(text, position)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        return f"{error.msg} at {place}"
    except RecursionError:
        return "nested too deeply"
    except ValueError as error:
        return str(error)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _is_one_json_value(text: str) -> bool:
    start = _skip_space(text, 0)
    result = _decode_at(_Decoder(), text, start)
    return not isinstance(result, str) and not text[result[1] :].strip()
