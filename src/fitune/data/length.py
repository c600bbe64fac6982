"""What happens to samples longer than a row: refuse, drop, cut, or split; never in silence.

`cut` takes, in this order and only as much as needed: the oldest exchanges; the beginning of the last question
(never its end; it keeps at least half the row); the end of the answer, which then has no end-of-turn token, so
that no model learns to stop in the middle. The system message stays. Plain text loses its end.

`split` is for plain text, which goes on in another sample where one is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fitune.data.conversation import Message, Sample
from fitune.data.encoding import EncodedSample, Encoder, TrainOn, cut_to, with_system
from fitune.errors import InputError

OverLength = Literal["error", "drop", "cut", "split"]
OVER_LENGTH: tuple[OverLength, ...] = ("error", "drop", "cut", "split")


@dataclass(frozen=True, slots=True)
class Fitted:
    """What the policy made of one sample.

    Attributes:
        encoded: at most `max_tokens` long; None: dropped.
        full_tokens: how long the sample was.
        note: what was done, in words; empty: nothing, it fits.
    """

    encoded: EncodedSample | None
    full_tokens: int
    note: str = ""


def fit_or_split(
    sample: Sample, encoder: Encoder, max_tokens: int, policy: OverLength = "error",
    train_on: TrainOn = "assistant", system: str | None = None,
) -> list[Fitted]:  # fmt: skip
    """As `fit_length`; a text that is split comes as its parts.

    Each but the first begins with the last token of the one before, which is not trained a second time: so every
    token of the text is trained once, given what of its part precedes it.
    """
    if policy != "split" or sample.text is None:
        return [fit_length(sample, encoder, max_tokens, policy, train_on, system)]
    whole = encoder.encode(sample, train_on, system)
    full = len(whole)
    parts: list[Fitted] = []
    for start in range(0, max(1, full - 1), max_tokens - 1):
        tokens = whole.tokens[start : start + max_tokens]
        trained = (False, *whole.trained[start + 1 : start + max_tokens])
        first = not parts
        note = (
            f"{full} tokens, split into {-(-(full - 1) // (max_tokens - 1))}" if first and full > max_tokens else ""
        )
        part = replace(
            whole, tokens=tokens, trained=trained, lost_characters=whole.lost_characters * first,
            control_tokens_in_text=whole.control_tokens_in_text * first,
        )  # fmt: skip
        parts.append(Fitted(part, full, note))
    return parts


def fit_length(
    sample: Sample,
    encoder: Encoder,
    max_tokens: int,
    policy: OverLength = "error",
    train_on: TrainOn = "assistant",
    system: str | None = None,
) -> Fitted:
    """Encodes a sample and makes it fit into `max_tokens` tokens.

    Raises:
        InputError: the sample cannot be encoded; or it is too long and the policy is "error"; or it cannot
            be cut because what must stay (the system message) fills the row by itself.
    """
    if policy not in OVER_LENGTH:
        raise InputError(f"over_length: {policy!r} is unknown; known: {', '.join(OVER_LENGTH)}")
    encoded = encoder.encode(sample, train_on, system)
    full = len(encoded)
    if full <= max_tokens:
        return Fitted(encoded, full)
    if policy in ("error", "split"):
        other = '"drop" or "cut" ("split" is for plain text)' if policy == "split" else '"drop" or "cut"'
        raise InputError(
            f"{full} tokens, but a row holds {max_tokens} (data.max_tokens); raise max_tokens, "
            f"or set data.over_length to {other}",
            where=str(sample.origin) if sample.origin else None,
        )
    if policy == "drop":
        return Fitted(None, full, f"{full} tokens, dropped")
    if sample.rejected:
        raise InputError(
            f"{full} tokens in both answers and what comes before, but a row holds {max_tokens} (data.max_tokens), "
            'and a pair is not cut; raise max_tokens, or set data.over_length to "drop"',
            where=str(sample.origin) if sample.origin else None,
        )
    if sample.text is not None:
        return Fitted(cut_to(encoded, max_tokens), full, f"{full} tokens, the text's end cut")
    return _cut(replace(sample, messages=with_system(sample.messages, system)), encoder, max_tokens, train_on, full)


def _cut(sample: Sample, encoder: Encoder, max_tokens: int, train_on: TrainOn, full: int) -> Fitted:
    head, exchanges = _exchanges(sample.messages)
    notes = []

    def encode(messages: Sequence[Message]) -> EncodedSample:
        return encoder.encode(replace(sample, messages=tuple(messages)), train_on)

    def joined(first: int) -> list[Message]:
        return [*head, *(message for exchange in exchanges[first:] for message in exchange)]

    first = 0
    encoded = encode(joined(0))
    while len(encoded) > max_tokens and first < len(exchanges) - 1:
        first += 1
        encoded = encode(joined(first))
    if first:
        notes.append(f"the oldest {first} of {len(exchanges)} exchanges cut")
    if len(encoded) > max_tokens:
        messages = joined(first)
        question = len(head)
        prompt_tokens = _first_trained(encoded)
        room = max(max_tokens - (len(encoded) - prompt_tokens), max_tokens // 2)
        if prompt_tokens > room and messages[question].role == "user":
            removed = _least_cut(messages, question, encode, room)
            messages[question] = _without_beginning(messages[question], removed)
            encoded = encode(messages)
            notes.append(f"the question's first {removed} characters cut")
    if len(encoded) > max_tokens:
        if _first_trained(encoded) >= max_tokens:
            raise InputError(
                f"{full} tokens, and cannot be cut to {max_tokens}: what must stay before the answer "
                f"(system message, template) takes {_first_trained(encoded)}; raise data.max_tokens",
                where=str(sample.origin) if sample.origin else None,
            )
        encoded = cut_to(encoded, max_tokens)
        notes.append("the answer's end cut, with its end-of-turn token")
    return Fitted(replace(encoded, is_cut=True), full, f"{full} tokens: {', '.join(notes)}")


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages before the first turn, and the rest in pieces that each begin with a question."""
    head: list[Message] = []
    exchanges: list[list[Message]] = []
    for message in messages:
        if message.role == "system" and not exchanges:
            head.append(message)
        elif message.role == "user" or not exchanges:
            exchanges.append([message])
        else:
            exchanges[-1].append(message)
    return head, exchanges


def _first_trained(encoded: EncodedSample) -> int:
    return encoded.trained.index(True) if any(encoded.trained) else len(encoded)


def _without_beginning(message: Message, characters: int) -> Message:
    return replace(message, content=message.content[characters:])


def _least_cut(messages: list[Message], place: int, encode: object, room: int) -> int:
    """How many characters of `messages[place]` must go for the prompt to be at most `room` tokens."""
    assert callable(encode)
    low, high = 0, len(messages[place].content)
    while low < high:
        middle = (low + high) // 2
        shorter = [*messages]
        shorter[place] = _without_beginning(messages[place], middle)
        if _first_trained(encode(shorter)) <= room:
            high = middle
        else:
            low = middle + 1
    return low
