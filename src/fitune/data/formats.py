"""Records in, conversations out: the known formats, how each is recognised, and how it is converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fitune.data.conversation import Message, Origin, Sample
from fitune.data.fields import RecordError, keys_of, kind_of_value, string, text_of
from fitune.data.turns import message_of, messages_of, tools_of

# What a judgement of a single answer is called.
LABELS = ("label", "kto_tag")


@dataclass(frozen=True, slots=True)
class Format:
    """One known format.

    Attributes:
        name: what `format:` in the run file calls it.
        keys: the keys that make a record this format, all of them needed.
        convert: record -> sample, without its origin.
        optional: keys that the conversion reads when they are there.
        objective: what such samples are; "": conversations and texts, to be learnt as they stand there.
        trained_by: the run file's `train.objective`s that learn from them.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Sample]
    optional: tuple[str, ...] = ()
    objective: str = ""
    trained_by: tuple[str, ...] = ("supervised",)


def _with_system(record: Mapping[str, Any], messages: list[Message]) -> tuple[Message, ...]:
    system = text_of(record, "system", needed=False)
    if system and messages and messages[0].role == "system":
        raise RecordError('both "system" and a first turn with the role system; keep one')
    return (Message("system", system), *messages) if system else tuple(messages)


def _alpaca_question(record: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise RecordError(f'"history" must be a list of [question, answer] pairs, found {kind_of_value(history)}')
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(f'"history" entry {number} must be a [question, answer] pair')
        messages.append(Message("user", string(pair[0], f'"history" question {number}')))
        messages.append(Message("assistant", string(pair[1], f'"history" answer {number}')))
    parts = [text_of(record, "instruction"), text_of(record, "input", needed=False)]
    question = "\n".join(part for part in parts if part)
    if not question:
        raise RecordError('"instruction" and "input" are both empty')
    return [*messages, Message("user", question)]


def _alpaca(record: Mapping[str, Any]) -> Sample:
    messages = [*_alpaca_question(record), Message("assistant", text_of(record, "output"))]
    return Sample(_with_system(record, messages))


def _pair(question: str, answer: str) -> Callable[[Mapping[str, Any]], Sample]:
    def convert(record: Mapping[str, Any]) -> Sample:
        asked = text_of(record, question)
        if not asked:
            raise RecordError(f'"{question}" is empty')
        answered = text_of(record, answer)
        return Sample(_with_system(record, [Message("user", asked), Message("assistant", answered)]))

    return convert


def _turns(key: str) -> Callable[[Mapping[str, Any]], Sample]:
    def convert(record: Mapping[str, Any]) -> Sample:
        return Sample(_with_system(record, messages_of(record[key], f'"{key}"')), tools=tools_of(record))

    return convert


def _plain(record: Mapping[str, Any]) -> Sample:
    text = text_of(record, "text")
    if not text:
        raise RecordError('"text" is empty')
    return Sample(text=text)


def _preference(record: Mapping[str, Any]) -> Sample:
    """A question in any style, and two answers to it: texts, turns, or whole conversations that begin alike."""
    better, worse = (_answer(record, key) for key in ("chosen", "rejected"))
    question = _question(record)
    if question is None:
        shared = 0
        while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
            shared += 1
        question, better, worse = better[:shared], better[shared:], worse[shared:]
        if not question:
            raise RecordError('"chosen" and "rejected" share no question, and there is none beside them')
    elif better[: len(question)] == question == worse[: len(question)]:
        better, worse = better[len(question) :], worse[len(question) :]
    for key, answer in (("chosen", better), ("rejected", worse)):
        if not answer or answer[0].role != "assistant" or answer[-1].role != "assistant":
            raise RecordError(f'"{key}" must be an answer of the assistant')
    if better == worse:
        raise RecordError('"chosen" and "rejected" are the same')
    prompt = _with_system(record, question)
    return Sample((*prompt, *better), rejected=(*prompt, *worse), tools=tools_of(record))


def _question(record: Mapping[str, Any]) -> list[Message] | None:
    """What stands beside the two answers; None: nothing does."""
    if "instruction" in record:
        return _alpaca_question(record)
    for key in ("messages", "conversations", "prompt", "question"):
        if key not in record:
            continue
        value = record[key]
        if isinstance(value, str) and key in ("prompt", "question"):
            if not value:
                raise RecordError(f'"{key}" is empty')
            return [Message("user", string(value, f'"{key}"'))]
        return messages_of(value, f'"{key}"')
    return None


def _answer(record: Mapping[str, Any], key: str) -> list[Message]:
    value = record[key]
    if isinstance(value, list):
        return messages_of(value, f'"{key}"')
    if isinstance(value, dict):
        return [message_of(value, f'"{key}"')]
    return [Message("assistant", string(value, f'"{key}"'))]


def _judged(record: Mapping[str, Any]) -> Sample:
    """One answer, whatever the style, and whether it is good."""
    key = next(key for key in LABELS if key in record)
    label = {"true": True, "false": False, "1": True, "0": False}.get(str(record[key]).lower())
    if label is None or not isinstance(record[key], bool | str | int):
        raise RecordError(f'"{key}" must be true or false (1 or 0), found {str(record[key])[:60]!r}')
    rest = {name: value for name, value in record.items() if name != key}
    for style in ("messages", "sharegpt", "alpaca", "prompt_completion", "question_answer"):
        if FORMATS[style].keys[0] not in rest:
            continue
        if style == "prompt_completion" and not isinstance(rest["prompt"], str):
            messages = [*_question(rest), *_answer(rest, "completion")]  # type: ignore[misc]
            sample = Sample(_with_system(rest, messages), tools=tools_of(rest))
        else:
            sample = FORMATS[style].convert(rest)
        if sample.messages[-1].role != "assistant":
            raise RecordError("the last turn must be the assistant's, which the label is about")
        return replace(sample, label=label)
    raise RecordError(f"there is no answer beside {key!r} (keys found: {keys_of(record)})")


_CHAT = ("system", "tools")
_OF_ALPACA = ("input", "system", "history")
_QUESTIONS = ("instruction", "messages", "conversations", "prompt", "question")

FORMATS: Mapping[str, Format] = {
    known.name: known
    for known in (
        Format("alpaca", ("instruction", "output"), _alpaca, _OF_ALPACA),
        Format("sharegpt", ("conversations",), _turns("conversations"), _CHAT),
        Format("messages", ("messages",), _turns("messages"), _CHAT),
        Format("prompt_completion", ("prompt", "completion"), _pair("prompt", "completion"), ("system",)),
        Format("question_answer", ("question", "answer"), _pair("question", "answer"), ("system",)),
        Format("text", ("text",), _plain),
        Format(
            "preference", ("chosen", "rejected"), _preference, (*_QUESTIONS, "input", "history", *_CHAT),
            "preference pairs", ("dpo", "orpo"),
        ),
        Format(
            "kto", ("label",), _judged,
            (*LABELS, *_QUESTIONS, "output", "completion", "answer", "input", "history", *_CHAT),
            "answers labelled good or bad", ("kto",),
        ),
    )
}  # fmt: skip
TRAINABLE = tuple(name for name, known in FORMATS.items() if not known.objective)
FIELDS = tuple(sorted({key for known in FORMATS.values() for key in (*known.keys, *known.optional)}))


def known_formats() -> str:
    """The formats a record can have, in one line for messages."""
    return "; ".join(f"{name} ({', '.join(known.keys)})" for name, known in FORMATS.items())


def recognise(record: Mapping[str, Any]) -> str:
    """The name of the one format this record has.

    Raises:
        RecordError: it has none, or several.
    """
    keys = record.keys()
    if {"chosen", "rejected"} <= keys:
        return "preference"
    asked = keys & {"messages", "conversations", "instruction", "prompt", "question"}
    if asked and ("kto_tag" in keys or isinstance(record.get("label"), bool) or _is_named_label(record)):
        return "kto"
    found = [name for name in TRAINABLE if keys >= set(FORMATS[name].keys)]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecordError(
            f"the keys fit several formats: {', '.join(found)} (keys found: {keys_of(record)}); "
            "name one with `format:`"
        )
    raise RecordError(
        f"the keys fit no known format (keys found: {keys_of(record)}); known: {known_formats()}; "
        "map other names with `columns:`"
    )


def _is_named_label(record: Mapping[str, Any]) -> bool:
    """In tables a label is a word."""
    return str(record.get("label")).lower() in ("true", "false")


def convert(record: Mapping[str, Any], name: str, origin: Origin) -> Sample:
    """One record of the format `name` as a sample; keys the format does not know go to `Sample.extra`.

    Raises:
        RecordError: the record does not fit.
    """
    known = FORMATS[name]
    missing = [key for key in known.keys if key not in record and not (key in LABELS and "kto_tag" in record)]
    if missing:
        named = ", ".join(f'"{key}"' for key in missing)
        raise RecordError(f"{named} is missing for the format {name} (keys found: {keys_of(record)})")
    extra = {key: value for key, value in record.items() if key not in (*known.keys, *known.optional)}
    return replace(known.convert(record), origin=origin, extra=extra)
