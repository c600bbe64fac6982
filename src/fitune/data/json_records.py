"""JSON in, records with their lines out: a list of samples, or one sample a line; broken ones are named."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fitune.data.file_lines import RECORD_BYTES, blocks, lines, not_utf8
from fitune.data.record import Problems, Record
from fitune.errors import InputError

_SPACE = " \t\r\n"


def line_records(path: Path, problems: Problems) -> Iterator[Record]:
    """A value on every line that is not blank."""
    decode = _Decoder()
    for number, raw in lines(path):
        if len(raw) > RECORD_BYTES:
            problems.add(number, f"a line of more than {RECORD_BYTES >> 20} MiB")
            continue
        try:
            text = raw.decode("utf-8").strip(" \t\r")
        except UnicodeDecodeError as error:
            problems.add(number, not_utf8(error))
            continue
        if not text:
            continue
        result = decode.at(text, 0)
        if isinstance(result, str):
            problems.add(number, f"not valid JSON: {result}")
        elif decode.repeated is not None:
            problems.add(number, f"the key {decode.repeated!r} occurs twice in one object")
        elif text[result[1] :].strip():
            problems.add(number, f"text after the end of the object: {text[result[1] :].strip()[:20]!r}")
        else:
            yield Record(number, result[0])


def list_records(path: Path, problems: Problems) -> Iterator[Record]:
    """The values of one JSON list, each with the line it begins on.

    Beyond a syntax error nothing says where the next one begins: it is the last problem that is named.
    """
    decode = _Decoder()
    text = _Window(path)
    text.skip_space()
    text.take("[")
    text.skip_space()
    after_comma = False
    while True:
        if not text.rest():
            problems.add(text.line, "the file ends inside the list; it was cut short")
            return
        if text.is_at("]"):
            if after_comma:
                problems.add(text.line, "a comma before the closing bracket of the list")
                return
            break
        result = text.value(decode)
        if isinstance(result, str):
            problems.add(text.line, f"the sample that starts here is broken: {result}; reading stopped there")
            return
        if decode.repeated is not None:
            problems.add(text.line, f"the key {decode.repeated!r} occurs twice in one object")
        else:
            yield Record(text.line, result[0])
        text.move_to(result[1])
        text.skip_space()
        after_comma = text.is_at(",")
        if after_comma:
            text.take(",")
            text.skip_space()
        elif text.rest() and not text.is_at("]"):
            problems.add(text.line, f"expected a comma or ] after a sample, found {text.rest()[:20]!r}")
            return
    text.take("]")
    text.skip_space()
    if text.rest():
        problems.add(text.line, f"text after the end of the list: {text.rest().strip()[:20]!r}")


def first_character(path: Path) -> str:
    """The first that is not space; "" where there is none."""
    for place, block in enumerate(blocks(path)):
        text = block.removeprefix(codecs.BOM_UTF8) if place == 0 else block
        if rest := text.lstrip(b" \t\r\n"):
            return chr(rest[0])
    return ""


def is_one_value(path: Path) -> bool:
    """Whether the whole file is one JSON value (of `RECORD_BYTES` at most)."""
    text = _Window(path)
    text.skip_space()
    result = text.value(_Decoder())
    if isinstance(result, str):
        return False
    text.move_to(result[1])
    text.skip_space()
    return not text.rest()


class _Window:
    """What is being read of a file's text: from `line`, on which it begins, as far as it has been read."""

    def __init__(self, path: Path) -> None:
        self.line = 1
        self._path = path
        self._text, self._at = "", 0
        self._blocks = blocks(path)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoded_lines = 1
        self._is_done = False

    def rest(self) -> str:
        """Some of what comes next; "" only at the file's end."""
        while self._at == len(self._text) and self._more():
            pass
        return self._text[self._at : self._at + 40]

    def is_at(self, letter: str) -> bool:
        return self.rest().startswith(letter)

    def take(self, letter: str) -> None:
        assert self.is_at(letter)
        self._at += 1

    def skip_space(self) -> None:
        while True:
            start = self._at
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            self.line += self._text.count("\n", start, self._at)
            if self._at < len(self._text) or not self._more():
                return

    def value(self, decode: _Decoder) -> tuple[Any, int] | str:
        """The value that begins here and where it ends, or a sentence on why there is none."""
        while True:
            result = decode.at(self._text, self._at)
            # What ends with the text may go on in what has not been read, and so may what is broken.
            is_whole = not isinstance(result, str) and result[1] < len(self._text)
            if is_whole:
                return result
            if len(self._text) - self._at > RECORD_BYTES:
                return f"it takes more than {RECORD_BYTES >> 20} MiB" if isinstance(result, str) else result
            wanted = 2 * (len(self._text) - self._at)
            if not self._more():
                return result
            while len(self._text) - self._at < wanted and self._more():
                pass

    def move_to(self, place: int) -> None:
        self.line += self._text.count("\n", self._at, place)
        self._at = place

    def _more(self) -> bool:
        """Reads a block; whether there was one."""
        if self._is_done:
            return False
        block = next(self._blocks, None)
        try:
            new = self._decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            line = self._decoded_lines + error.object.count(b"\n", 0, error.start)
            raise InputError(f"line {line}: {not_utf8(error)}", where=self._path) from None
        self._is_done = block is None
        self._decoded_lines += new.count("\n")
        self._text, self._at = self._text[self._at :] + new, 0
        return not self._is_done or bool(new)


class _Decoder:
    """A JSON decoder that takes what JSON has and no more, and notes keys that occur twice in one object."""

    def __init__(self) -> None:
        self.repeated: str | None = None
        self._raw_decode = json.JSONDecoder(
            object_pairs_hook=self._unique, parse_constant=_refuse_constant
        ).raw_decode

    def at(self, text: str, position: int) -> tuple[Any, int] | str:
        """The value at `position` and where it ends, or a sentence that says why there is none."""
        self.repeated = None
        try:
            return self._raw_decode(text, position)
        except json.JSONDecodeError as error:
            place = f"column {error.colno}"
            if "\n" in text[position : error.pos]:
                place = f"line {1 + text.count(chr(10), position, error.pos)} of it, {place}"
            return f"{error.msg} at {place}"
        except RecursionError:
            return "nested too deeply"
        except ValueError as error:
            return str(error)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs) and self.repeated is None:
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.repeated = key
                    break
                seen.add(key)
        return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON has")
