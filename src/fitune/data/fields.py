"""The fields of a record: text that is there, of the right kind, and readable; what is not is said in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN_KEYS = 20


class RecordError(ValueError):
    """A record that does not fit its format; the message is the sentence the user reads."""


def text_of(record: Mapping[str, Any], key: str, needed: bool = True) -> str:
    """The text under a key; "" where it is absent or null and not needed."""
    if key not in record or (record[key] is None and not needed):
        if needed:
            raise RecordError(f'"{key}" is missing (keys found: {keys_of(record)})')
        return ""
    return string(record[key], f'"{key}"')


def string(value: Any, name: str) -> str:
    """The value, which must be text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RecordError(f"{name} must be text, found {kind_of_value(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{name} holds half of a surrogate pair, which no tokenizer can read") from None
    return value


def kind_of_value(value: Any) -> str:
    """What a value is, for messages: "a list"."""
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "text",
    }
    return names.get(type(value), type(value).__name__)


def keys_of(record: Mapping[str, Any]) -> str:
    """Its first keys, for messages."""
    shown = [str(key)[:60] for _, key in zip(range(SHOWN_KEYS), record, strict=False)]
    more = len(record) - SHOWN_KEYS
    return ", ".join(shown) + (f", and {more:,} more" if more > 0 else "") or "none"
