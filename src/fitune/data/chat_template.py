"""A conversation in, the model's own text of it out, and which characters of that are the assistant's.

The mask is derived by construction. With R the render of the tokenizer's chat template:

- A trained turn begins where R(the turns before it, add_generation_prompt=True) ends: what generation is fed.
  That this is a prefix of the whole render is checked.
- It ends with the first control token after the answer that the template writes both when the turn is the
  last one and in the whole conversation. Where the answer ends is found by rendering once more with another
  answer in its place: all that follows it must be the same to the last character.

No text of the data is ever searched for. Where a check fails the conversation is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fitune.data.control_tokens import ControlTokens
from fitune.data.conversation import Message, ToolCall
from fitune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For base models, which have no template of their own.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% elif message['role'] == 'tool' %}{{ '### Result:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
# Templates that write today's date would make a resumed run differ from an uninterrupted one.
_FIXED_DATE = {
    "%d": "26",
    "%b": "Jul",
    "%B": "July",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%H": "12",
    "%M": "00",
    "%S": "00",
    "%A": "Friday",
    "%a": "Fri",
}
_STAND_INS = ("fituneStandIn7", "fituneOther5")

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the assistant in a render, in characters.

    Attributes:
        index: which message it is.
        start: where the generation prompt before it ends; None: the render does not hold that prompt.
        end: where its end-of-turn token ends (of the answer, where there is no such token).
        has_end_token: whether the template closes it with a control token.
        why_not: where `start` is None, the sentence that says so.
    """

    index: int
    start: int | None
    end: int
    has_end_token: bool
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Render:
    """A conversation as the template writes it.

    Attributes:
        text: the render, control tokens of the data broken by `breaker`.
        turns: the assistant's, in order.
        breaker: the character inside broken control tokens.
        control_tokens_in_text: how many control tokens the data held.
    """

    text: str
    turns: tuple[Turn, ...]
    breaker: str
    control_tokens_in_text: int


@dataclass(frozen=True, slots=True)
class _Talk:
    """A conversation whose texts hold no control token that is whole."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    breaker: str = ""
    count: int = 0

    def until(self, index: int) -> _Talk:
        return replace(self, messages=self.messages[:index])

    def with_message(self, index: int, message: Message) -> _Talk:
        return replace(self, messages=(*self.messages[:index], message, *self.messages[index + 1 :]))


class ChatTemplate:
    """The chat template of one tokenizer, or `DEFAULT_TEMPLATE` where it has none.

    Attributes:
        is_default: whether the tokenizer had no template.
        source: the template's Jinja text, as rendered (a date it asks for is always 26 July 2024).
        control_tokens: those of the tokenizer and of the template.

    Raises:
        InputError: the tokenizer is not a fast one, or has no template and no end token for the default one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, dict):
            own = tokenizer.get_chat_template()
        self.is_default = not own
        if self.is_default and not tokenizer.eos_token:
            raise InputError("the tokenizer has neither a chat template nor an end-of-text token; set one of them")
        self.source = own or _begin_text(tokenizer) + DEFAULT_TEMPLATE
        if "strftime_now" in self.source:
            self.source = _fixed_clock() + self.source
        self.control_tokens = ControlTokens(tokenizer, also=self._delimiters())

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> Render:
        """The whole conversation, with every turn of the assistant located.

        `tools`: definitions of what the assistant can call.

        Raises:
            InputError: the template refuses the conversation (its own message is quoted), leaves some of it out, or
                a check fails.
        """
        talk = self._broken(messages, tools)
        text = self._apply(talk)
        _refuse_left_out(talk, text)
        places = [index for index, message in enumerate(talk.messages) if message.role == "assistant"]
        return Render(text, tuple(self._turn(talk, index, text) for index in places), talk.breaker, talk.count)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> Render:
        """What generation is fed: the turns so far and the generation prompt. `Turn.end` is not located."""
        talk = self._broken(messages, tools)
        text = self._apply(talk, generation=True)
        _refuse_left_out(talk, text)
        turns = []
        for index, message in enumerate(talk.messages):
            if message.role == "assistant":
                start, why_not = self._start(talk, index, text)
                turns.append(Turn(index, start, len(text), False, why_not))
        return Render(text, tuple(turns), talk.breaker, talk.count)

    def end_of_turn_id(self) -> int | None:
        """The control token that closes the assistant's turns (None: there is none); generation stops at it."""
        messages = [Message("user", _STAND_INS[1]), Message("assistant", _STAND_INS[1] + "y")]
        try:
            render = self.render(messages)
        except InputError:
            return None
        turn = render.turns[0]
        start = max((start for start, end in self.control_tokens.spans(render.text) if end == turn.end), default=-1)
        return self.control_tokens.names.get(render.text[start : turn.end]) if turn.has_end_token else None

    def _broken(self, messages: Sequence[Message], tools: Tools) -> _Talk:
        """The conversation with every control token in its texts broken."""
        texts = [text for message in messages for text in _texts_of(message)]
        texts += [text for tool in tools for text in _texts_in(tool)]
        count = sum(map(self.control_tokens.count, texts))
        breaker = self.control_tokens.breaker_for(texts) if count else ""

        def broken(text: str) -> str:
            return self.control_tokens.broken(text, breaker)

        return _Talk(
            tuple(_with_texts(message, broken) for message in messages),
            tuple(_mapped(tool, broken) for tool in tools),
            breaker,
            count,
        )

    def _apply(self, talk: _Talk, generation: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [_turn_dict(message) for message in talk.messages],
                chat_template=self.source,
                tools=[dict(tool) for tool in talk.tools] or None,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except InputError:
            raise
        except Exception as error:  # a template may raise anything, its own refusals included
            roles = ", ".join(message.role for message in talk.messages) or "no turns"
            raise InputError(
                f"the chat template refuses this conversation ({roles}): {error or type(error).__name__}"
            ) from None
        assert isinstance(text, str)
        return text

    def _start(self, talk: _Talk, index: int, text: str) -> tuple[int | None, str]:
        prompt = self._apply(talk.until(index), generation=True)
        if text.startswith(prompt):
            return len(prompt), ""
        same = _common_prefix(prompt, text)
        return None, (
            f"turn {index + 1}: the chat template asks with {prompt[same:][-60:]!r} but writes "
            f"{text[same : same + 60]!r} once the answer is there, so training and generation would differ; "
            "train on the last turn only (train_on: last_assistant), or use another template"
        )

    def _turn(self, talk: _Talk, index: int, text: str) -> Turn:
        after = self._after(talk, index)
        answer_end = len(text) - len(after)
        start, why_not = self._start(talk, index, text)
        if not text.endswith(after) or (start is not None and start > answer_end):
            raise InputError(
                f"turn {index + 1}: the chat template changes the text after an answer with the answer's "
                "content, so what belongs to the assistant cannot be known for certain"
            )
        _refuse_lost_calls(talk.messages[index], index, text[start or 0 : answer_end])
        is_last = index + 1 == len(talk.messages)
        after_as_last = after if is_last else self._after(talk.until(index + 1), index)
        shared = after[: _common_prefix(after, after_as_last)]
        # What the two share may break off inside a longer control token: it must be one in the whole, too.
        whole = set(self.control_tokens.spans(after))
        ends = [end for start_end in self.control_tokens.spans(shared) if start_end in whole for end in start_end[1:]]
        return Turn(index, start, answer_end + (ends[0] if ends else 0), bool(ends), why_not)

    def _after(self, talk: _Talk, index: int) -> str:
        """The render after the text of turn `index`, found by rendering with a stand-in for that text."""
        stand_in = _STAND_INS[0]
        texts = [text for message in talk.messages for text in _texts_of(message)]
        while any(stand_in in text for text in texts):
            stand_in += "x"
        changed = self._apply(talk.with_message(index, Message("assistant", stand_in)))
        if changed.count(stand_in) != 1:
            raise InputError(
                f"turn {index + 1}: the chat template writes the assistant's text {changed.count(stand_in)} "
                "times; exactly once is needed to know what to train on"
            )
        return changed.partition(stand_in)[2]

    def _delimiters(self) -> set[str]:
        """Added tokens that the template writes around turns, whether or not they are marked special."""
        added = sorted(
            (token.content for token in self._tokenizer.added_tokens_decoder.values()), key=len, reverse=True
        )
        if not added:
            return set()
        matcher = re.compile("|".join(map(re.escape, added)))
        try:
            question = (Message("user", _STAND_INS[0]),)
            asked = self._apply(_Talk(question))
            answered = self._apply(_Talk((*question, Message("assistant", _STAND_INS[1]))))
        except InputError:
            return set()  # a template with other roles: the tokens marked special are all that is known
        ends = matcher.search(answered.rpartition(_STAND_INS[1])[2])
        return set(matcher.findall(asked)) | ({ends.group()} if ends else set())


def _turn_dict(message: Message) -> dict[str, Any]:
    """As transformers' templates expect it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "type": "function",
                **({"id": call.id} if call.id else {}),
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.name:
        turn["name"] = message.name
    if message.call_id:
        turn["tool_call_id"] = message.call_id
    return turn


def _texts_of(message: Message) -> list[str]:
    calls = [text for call in message.tool_calls for text in (call.name, call.id, *_texts_in(call.arguments))]
    return [message.content, message.name, message.call_id, *calls]


def _texts_in(value: Any) -> list[str]:
    """All texts in a value as JSON has them, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, inner in value.items() for text in (str(key), *_texts_in(inner))]
    return [text for inner in value for text in _texts_in(inner)] if isinstance(value, list) else []


def _with_texts(message: Message, changed: Callable[[str], str]) -> Message:
    calls = tuple(
        ToolCall(changed(call.name), _mapped(call.arguments, changed), changed(call.id))
        for call in message.tool_calls
    )
    return Message(
        message.role, changed(message.content), None, calls, changed(message.name), changed(message.call_id)
    )


def _mapped(value: Any, changed: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return changed(value)
    if isinstance(value, Mapping):
        return {changed(str(key)): _mapped(inner, changed) for key, inner in value.items()}
    return [_mapped(inner, changed) for inner in value] if isinstance(value, list) else value


def _refuse_left_out(talk: _Talk, text: str) -> None:
    """What the assistant does not say is there to be read: a template that leaves it out loses it in silence."""
    for index, message in enumerate(talk.messages):
        if message.role != "assistant" and not _is_written(message.content.strip(), text):
            raise InputError(
                f"turn {index + 1} ({message.role}): the chat template leaves its text out or changes it; remove the "
                "turn, or use another template"
            )
    missing = [str(tool["function"]["name"]) for tool in talk.tools if str(tool["function"]["name"]) not in text]
    if missing:
        raise InputError(
            f"the chat template does not write the tools' definitions ({', '.join(missing[:5])}); remove the tools, "
            "or use a template that knows them"
        )


def _is_written(content: str, text: str) -> bool:
    """As it is, or as JSON, which some templates make of what tools answer."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _refuse_lost_calls(message: Message, index: int, written: str) -> None:
    lost = [call.name for call in message.tool_calls if call.name not in written]
    if lost:
        raise InputError(
            f"turn {index + 1}: the chat template does not write calls of tools ({', '.join(lost[:5])}); remove the "
            "sample, or use a template that knows them"
        )


def _begin_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Jinja that writes the begin-of-text token, for a tokenizer that begins every text with it."""
    bos = tokenizer.bos_token_id
    return "{{ bos_token }}" if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ""


def _fixed_clock() -> str:
    replaced = "".join(f".replace('{directive}', '{value}')" for directive, value in _FIXED_DATE.items())
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro -%}"


def _common_prefix(one: str, other: str) -> int:
    """How many characters the two begin with alike."""
    if other.startswith(one):
        return len(one)
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
