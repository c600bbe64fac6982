"""Identifiers of a database as English words: `order_items` -> "order items", one: "order item".

Small rules, no dictionary: enough for names of tables and columns, harmless where they do not know better.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_IRREGULAR = {
    "person": "people",
    "child": "children",
    "man": "men",
    "woman": "women",
    "id": "ids",
    "datum": "data",
    "medium": "media",
    "index": "indices",
    "foot": "feet",
    "goose": "geese",
    "mouse": "mice",
    "tooth": "teeth",
    "wife": "wives",
    "life": "lives",
    "leaf": "leaves",
    "shelf": "shelves",
    "quiz": "quizzes",
    "hero": "heroes",
    "potato": "potatoes",
}
_SINGULARS = {plural: singular for singular, plural in _IRREGULAR.items()}
_SAME_IN_BOTH = frozenset(
    """
    series species staff equipment news information status sales stock furniture money data media music
    weather physics mathematics statistics means headquarters
    """.split()  # noqa: SIM905
)
_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words_of(identifier: str) -> str:
    """Identifier -> lower-case words, one space between; short capital words (ID, URL) in lower case too."""
    spaced = _CAMEL_HUMP.sub(" ", identifier).replace("_", " ")
    words = " ".join(spaced.split()).lower()
    return words or identifier


def distinct_words(identifiers: Iterable[str]) -> dict[str, str]:
    """Identifiers -> words each; those that would read the same keep their spelling, to stay apart."""
    words = {identifier: words_of(identifier) for identifier in identifiers}
    readings = Counter(words.values())
    return {name: text if readings[text] == 1 else name for name, text in words.items()}


def _split_last(words: str) -> tuple[str, str]:
    head, space, last = words.rpartition(" ")
    return head + space, last


def is_plural(words: str) -> bool:
    """Does the last word look like a plural?"""
    last = _split_last(words)[1].lower()
    if last in _SINGULARS or last in _SAME_IN_BOTH:
        return True
    return len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "us", "is", "as"))


def plural(words: str) -> str:
    """ "city" -> "cities"; plurals stay as they are."""
    if is_plural(words):
        return words
    head, last = _split_last(words)
    if not last[-1:].isalpha():
        return words
    if last in _IRREGULAR:
        return head + _IRREGULAR[last]
    if last.endswith(("s", "x", "z", "ch", "sh")):
        return words + "es"
    if last.endswith("y") and last[-2:-1] not in tuple("aeiou") and len(last) > 1:
        return head + last[:-1] + "ies"
    return words + "s"


def singular(words: str) -> str:
    """ "cities" -> "city"; singulars stay as they are."""
    head, last = _split_last(words)
    if last in _SINGULARS:
        return head + _SINGULARS[last]
    if last in _SAME_IN_BOTH or not is_plural(words):
        return words
    if last.endswith("ies") and len(last) > 4 and last not in ("movies", "cookies"):
        return head + last[:-3] + "y"
    if last.endswith(("sses", "xes", "zes", "ches", "shes", "uses")) and last not in (
        "houses",
        "sizes",
        "prizes",
    ):
        return head + last[:-2]
    return head + last[:-1]


def with_article(words: str) -> str:
    """ "order" -> "an order", "customer" -> "a customer"."""
    first = words[:1].lower()
    sounds_like_you = words.lower().startswith(("uni", "use", "usu", "eu", "one ", "uk", "us "))
    return f"{'an' if first in 'aeiou' and first and not sounds_like_you else 'a'} {words}"
