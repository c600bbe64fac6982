"""Signs in a text that something went wrong before it came here: wrong encodings, control characters, look-alikes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

# Allowed: tab, line feed, carriage return. The rest of C0 and C1, and what steers the direction of text unseen.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_REPLACED = "\ufffd"
# What the first byte of a UTF-8 sequence becomes when it is read as Windows-1252, and a run of what may follow.
_MISREAD = re.compile(
    r"[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122\u20ac]+"
)
_WORD = re.compile(r"[^\W\d_]{2,}")
# Scripts whose letters look like each other's; a word in two of them is a forgery or an error of recognition.
_ALIKE = frozenset({"LATIN", "CYRILLIC", "GREEK"})
SHOWN = 24


def text_problems(text: str) -> Iterator[tuple[str, str]]:
    """What is wrong with a text: (which kind, a sentence), each kind once at most.

    Kinds: "mojibake" (UTF-8 that was read as Windows-1252, or what could not be read at all), "control_characters",
    "mixed_scripts" (a word of letters of two alphabets that look alike).
    """
    found = _CONTROL.search(text)
    if found:
        yield (
            "control_characters",
            f"the control character U+{ord(found.group()):04X} at {_near(text, found.start())}",
        )
    if text.isascii():
        return
    place = text.find(_REPLACED)
    if place < 0:
        place = next((match.start() for match in _MISREAD.finditer(text) if _is_misread(match.group())), -1)
    if place >= 0:
        yield "mojibake", f"text that was read in a wrong encoding: {_near(text, place)}"
    mixed = next((word for word in _WORD.findall(text) if not word.isascii() and _is_mixed(word)), None)
    if mixed:
        yield "mixed_scripts", f"a word of two alphabets: {mixed[:SHOWN]!r}"


def _near(text: str, place: int) -> str:
    return repr(text[max(0, place - SHOWN // 2) : place + SHOWN // 2])


def _is_misread(run: str) -> bool:
    """Whether these characters are, as bytes, a letter in UTF-8."""
    for length in (2, 3, 4):
        if len(run) < length:
            return False
        try:
            raw = bytes(_as_byte(letter) for letter in run[:length])
            if len(raw.decode("utf-8")) == 1:
                return True
        except (UnicodeError, ValueError):
            continue
    return False


def _as_byte(letter: str) -> int:
    """Windows-1252, with Latin-1 where that has no letter."""
    return ord(letter) if ord(letter) < 256 else letter.encode("cp1252")[0]


def _is_mixed(word: str) -> bool:
    return len({_script(letter) for letter in word} & _ALIKE) > 1


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
