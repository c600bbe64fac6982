"""Records in, conversations out: the known formats, how each is recognised, and how it is converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fitune.data.conversation import ROLES, Message, Origin, Role, Sample
from fitune.errors import InputError

# Roles as the ShareGPT and OpenAI styles spell them.
ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class RecordError(ValueError):
    """A record that does not fit its format; the message is the sentence the user reads."""


@dataclass(frozen=True, slots=True)
class Format:
    """One known format.

    Attributes:
        name: what `format:` in the run file calls it.
        keys: the keys that make a record this format, all of them needed.
        optional: keys that the conversion reads when they are there.
        convert: record -> conversation; None: recognised, and refused with `refusal`.
    """

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()
    convert: Callable[[Mapping[str, Any]], tuple[Message, ...] | str] | None = None
    refusal: str = ""


def _text(record: Mapping[str, Any], key: str, needed: bool = True) -> str:
    if key not in record or (record[key] is None and not needed):
        if needed:
            raise RecordError(f'"{key}" is missing (keys found: {_keys(record)})')
        return ""
    return _string(record[key], f'"{key}"')


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name} must be text, found {_kind(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise RecordError(f"{name} holds half of a surrogate pair, which no tokenizer can read")
    return value


def _kind(value: Any) -> str:
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


def _keys(record: Mapping[str, Any]) -> str:
    shown = [str(key) for key in list(record)[:20]]
    return ", ".join(shown) + (f", and {len(record) - 20} more" if len(record) > 20 else "") or "none"


def _with_system(record: Mapping[str, Any], messages: list[Message]) -> tuple[Message, ...]:
    system = _text(record, "system", needed=False)
    if system and messages and messages[0].role == "system":
        raise RecordError('both "system" and a first turn with the role system; keep one')
    return (Message("system", system), *messages) if system else tuple(messages)


def _alpaca(record: Mapping[str, Any]) -> tuple[Message, ...]:
    messages: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise RecordError(f'"history" must be a list of [question, answer] pairs, found {_kind(history)}')
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(f'"history" entry {number} must be a [question, answer] pair')
        messages.append(Message("user", _string(pair[0], f'"history" question {number}')))
        messages.append(Message("assistant", _string(pair[1], f'"history" answer {number}')))
    parts = [_text(record, "instruction"), _text(record, "input", needed=False)]
    question = "\n".join(part for part in parts if part)
    if not question:
        raise RecordError('"instruction" and "input" are both empty')
    messages += [Message("user", question), Message("assistant", _text(record, "output"))]
    return _with_system(record, messages)


def _pair(question: str, answer: str) -> Callable[[Mapping[str, Any]], tuple[Message, ...]]:
    def convert(record: Mapping[str, Any]) -> tuple[Message, ...]:
        asked = _text(record, question)
        if not asked:
            raise RecordError(f'"{question}" is empty')
        return _with_system(record, [Message("user", asked), Message("assistant", _text(record, answer))])

    return convert


def _turns(key: str) -> Callable[[Mapping[str, Any]], tuple[Message, ...]]:
    def convert(record: Mapping[str, Any]) -> tuple[Message, ...]:
        if record.get("tools"):
            raise RecordError('"tools" (tool definitions) cannot be trained by this version; remove the key')
        turns = record[key]
        if not isinstance(turns, list) or not turns:
            found = "an empty list" if turns == [] else _kind(turns)
            raise RecordError(f'"{key}" must be a list of turns, found {found}')
        return _with_system(record, [_turn(turn, f"turn {number}") for number, turn in enumerate(turns, 1)])

    return convert


def _turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(f"{name} must be an object, found {_kind(turn)}")
    if "from" in turn and "value" in turn:
        role, content, known = turn["from"], turn["value"], {"from", "value", "weight"}
    elif "role" in turn and "content" in turn:
        role, content, known = turn["role"], turn["content"], {"role", "content", "weight"}
    else:
        raise RecordError(f'{name} needs "role" and "content", or "from" and "value" (keys found: {_keys(turn)})')
    if role == "function_call" or turn.get("tool_calls") or turn.get("function_call"):
        raise RecordError(f"{name} is a tool call, which this version cannot train; remove the sample")
    unknown = [key for key in turn if key not in known and turn[key] not in (None, [], {})]
    if unknown:
        raise RecordError(f"{name} has keys that would be lost: {', '.join(map(str, unknown))}; remove them")
    if not isinstance(role, str) or role.lower() not in ROLE_NAMES:
        raise RecordError(f"{name} has the unknown role {role!r}; known: {', '.join(ROLE_NAMES)}")
    trained = None
    if "weight" in turn:
        if turn["weight"] not in (0, 1):
            raise RecordError(f'{name} has "weight" {turn["weight"]!r}; known: 0 (not trained), 1 (trained)')
        trained = bool(turn["weight"])
    message = Message(ROLE_NAMES[role.lower()], _content(content, name), trained)
    if trained and message.role != "assistant":
        raise RecordError(f'{name} has "weight" 1, but only turns of the assistant can be trained')
    return message


def _content(content: Any, name: str) -> str:
    if not isinstance(content, list):
        return _string(content, f"{name}'s text")
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RecordError(f"{name} has a part that is not text; this version trains text only")
        parts.append(_string(part.get("text"), f"{name}'s text"))
    return "".join(parts)


def _plain(record: Mapping[str, Any]) -> str:
    text = _text(record, "text")
    if not text:
        raise RecordError('"text" is empty')
    return text


FORMATS: Mapping[str, Format] = {
    known.name: known
    for known in (
        Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
        Format("sharegpt", ("conversations",), ("system", "tools"), _turns("conversations")),
        Format("messages", ("messages",), ("system", "tools"), _turns("messages")),
        Format("prompt_completion", ("prompt", "completion"), ("system",), _pair("prompt", "completion")),
        Format("question_answer", ("question", "answer"), ("system",), _pair("question", "answer")),
        Format("text", ("text",), (), _plain),
        Format(
            "preference",
            ("chosen", "rejected"),
            refusal="these are preference pairs, which this version cannot train",
        ),
        Format(
            "kto",
            ("label",),
            refusal="these are answers labelled good or bad, which this version cannot train",
        ),
    )
}
TRAINABLE = tuple(name for name, known in FORMATS.items() if known.convert)
FIELDS = tuple(
    sorted({key for name in TRAINABLE for key in (*FORMATS[name].keys, *FORMATS[name].optional)} - {"tools"})
)


def known_formats() -> str:
    """The formats a record can have, in one line for messages."""
    return "; ".join(f"{name} ({', '.join(FORMATS[name].keys)})" for name in TRAINABLE)


def map_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with its keys renamed as `columns` says (found -> wanted).

    Raises:
        RecordError: a named key is missing, or its new name is taken.
    """
    if not columns:
        return dict(record)
    missing = [key for key in columns if key not in record]
    if missing:
        raise RecordError(f"{', '.join(map(repr, missing))} of `columns` is missing (keys found: {_keys(record)})")
    taken = [wanted for found, wanted in columns.items() if wanted in record and wanted not in columns]
    if taken:
        raise RecordError(f"`columns` maps to {', '.join(map(repr, taken))}, which the record already has")
    return {columns.get(key, key): value for key, value in record.items()}


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises InputError where `columns` maps to no known field, or two keys to one."""
    unknown = sorted({wanted for wanted in columns.values() if wanted not in FIELDS})
    problems = [f"columns: no known field {name!r}; known: {', '.join(FIELDS)}" for name in unknown]
    wanted = list(columns.values())
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    problems += [f"columns: two keys are mapped to {name!r}" for name in twice]
    if problems:
        raise InputError(problems)


def recognise(record: Mapping[str, Any]) -> str:
    """The name of the one format this record has.

    Raises:
        RecordError: it has none, or several.
    """
    keys = record.keys()
    if FORMATS["preference"].keys[0] in keys and "rejected" in keys:
        return "preference"
    if isinstance(record.get("label"), bool) and keys & {
        "messages",
        "conversations",
        "instruction",
        "prompt",
    }:
        return "kto"
    found = [name for name in TRAINABLE if keys >= set(FORMATS[name].keys)]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecordError(
            f"the keys fit several formats: {', '.join(found)} (keys found: {_keys(record)}); name one with `format:`"
        )
    raise RecordError(
        f"the keys fit no known format (keys found: {_keys(record)}); known: {known_formats()}; "
        "map other names with `columns:`"
    )


def convert(record: Mapping[str, Any], name: str, origin: Origin) -> Sample:
    """One record of the format `name` as a sample; keys the format does not know go to `Sample.extra`.

    Raises:
        RecordError: the record does not fit.
    """
    known = FORMATS[name]
    if known.convert is None:
        raise RecordError(known.refusal)
    missing = [key for key in known.keys if key not in record]
    if missing:
        named = ", ".join(f'"{key}"' for key in missing)
        raise RecordError(f"{named} is missing for the format {name} (keys found: {_keys(record)})")
    content = known.convert(record)
    extra = {key: value for key, value in record.items() if key not in (*known.keys, *known.optional)}
    if isinstance(content, str):
        return Sample(text=content, origin=origin, extra=extra)
    assert all(message.role in ROLES for message in content)
    return Sample(messages=content, origin=origin, extra=extra)
