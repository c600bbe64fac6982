"""A sample in, token ids and a trained/not trained flag for each of them out.

Training and generation tokenise alike: the tokens before a turn of the assistant are exactly
`encode_prompt` of the turns before it. So the text is cut where each generation prompt ends, and no token
reaches across; that is where a model that generates begins to write tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fitune.data.chat_template import ChatTemplate, Render, Tools
from fitune.data.conversation import Message, Origin, Sample
from fitune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last_assistant", "all"]
TRAIN_ON: tuple[TrainOn, ...] = ("assistant", "last_assistant", "all")


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample as tokens.

    Attributes:
        tokens: ids.
        trained: for each token whether its log-probability counts. The first token never can.
        origin: where the sample stands in its file.
        without_end_token: how many trained turns do not end with a trained end-of-turn token.
        control_tokens_in_text: how many control tokens the data held; they are encoded as plain text.
        lost_characters: how many of its characters the vocabulary cannot write (or runs of them).
        is_cut: whether the over-length policy shortened it.
        lost_end: whether that took the end of the text or of the last answer.
        worse_from: of a preference pair, where the tokens of the worse answer begin, after all of the better one's;
            0: it is no pair.
        fork: of a pair, how many of the first tokens come before both answers.
        label: of an answer judged by itself, whether it is good.
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    origin: Origin | None = None
    without_end_token: int = 0
    control_tokens_in_text: int = 0
    lost_characters: int = 0
    is_cut: bool = False
    lost_end: bool = False
    worse_from: int = 0
    fork: int = 0
    label: bool | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained_tokens(self) -> int:
        """How many tokens are trained."""
        return sum(self.trained)


class Encoder:
    """Encodes samples with one tokenizer and its chat template.

    Attributes:
        template: the chat template in use.

    Raises:
        InputError: the tokenizer cannot be used (`ChatTemplate` says why).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template = ChatTemplate(tokenizer)
        first = tokenizer("a")["input_ids"][:1]
        self._bos = list(first) if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []
        self._eos: int | None = tokenizer.eos_token_id

    def encode(self, sample: Sample, train_on: TrainOn = "assistant", system: str | None = None) -> EncodedSample:
        """As the module's `encode`."""
        if train_on not in TRAIN_ON:
            raise InputError(f"train_on: {train_on!r} is unknown; known: {', '.join(TRAIN_ON)}")
        try:
            if sample.text is not None:
                return self._encode_text(sample.text, sample.origin)
            if sample.rejected:
                return self._encode_pair(sample, system)
            messages = with_system(sample.messages, system)
            if sample.label is None:
                return self._encode_messages(messages, sample.tools, train_on, sample.origin)
            # The judgement is of the last answer.
            judged = self._encode_messages(messages, sample.tools, "last_assistant", sample.origin)
            return replace(judged, label=sample.label)
        except InputError as error:
            if sample.origin is None:
                raise
            raise InputError(error.problems, where=str(sample.origin)) from None

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """As the module's `encode_prompt`."""
        if not messages:
            raise InputError("there is no message to answer")
        render = self.template.prompt(messages, tools)
        return self.template.control_tokens.encode(render.text, _cuts(render), render.breaker).tokens

    def _encode_text(self, text: str, origin: Origin | None) -> EncodedSample:
        if self._eos is None:
            raise InputError("the tokenizer has no end-of-text token, which plain text must end with; set one")
        encoded = self.template.control_tokens.encode_plain(text)
        tokens = [*self._bos, *encoded.tokens, self._eos]
        trained = [index > 0 for index in range(len(tokens))]
        count = self.template.control_tokens.count(text)
        return EncodedSample(
            tuple(tokens),
            tuple(trained),
            origin,
            control_tokens_in_text=count,
            lost_characters=encoded.unknown + self.template.control_tokens.lost_characters(text),
        )

    def _encode_pair(self, sample: Sample, system: str | None) -> EncodedSample:
        """Of both conversations only what they do not share is trained."""
        pair = sample.messages, sample.rejected
        shared = _common(*pair)
        better, worse = (
            self._encode_messages(
                with_system((*map(_untrained, messages[:shared]), *messages[shared:]), system),
                sample.tools, "assistant", sample.origin,
            )
            for messages in pair
        )  # fmt: skip
        for name, one in (("better", better), ("worse", worse)):
            if not one.trained_tokens:
                raise InputError(f"the {name} answer has no token of its own: the other goes on where it ends")
        # The token after the fork cannot be trained: the fork's last one would have to predict it for both.
        fork = max(
            0, min(_common(better.tokens, worse.tokens), *(_first_trained(one) - 1 for one in (better, worse)))
        )
        return EncodedSample(
            better.tokens + worse.tokens[fork:],
            better.trained + worse.trained[fork:],
            sample.origin,
            without_end_token=better.without_end_token + worse.without_end_token,
            control_tokens_in_text=better.control_tokens_in_text + worse.control_tokens_in_text,
            lost_characters=better.lost_characters + worse.lost_characters,
            worse_from=len(better),
            fork=fork,
        )

    def _encode_messages(
        self, messages: Sequence[Message], tools: Tools, train_on: TrainOn, origin: Origin | None
    ) -> EncodedSample:
        if not messages:
            raise InputError("the conversation has no turns")
        render = self.template.render(messages, tools)
        cuts = _cuts(render)
        encoded = self.template.control_tokens.encode(render.text, cuts, render.breaker)
        border = dict(zip(cuts, encoded.borders, strict=True))
        trained = [train_on == "all"] * len(encoded.tokens)
        chosen = _trained_turns(messages, train_on)
        without_end = 0
        for turn in render.turns:
            is_chosen = turn.index in chosen
            if turn.start is None:
                if is_chosen and train_on != "all":
                    raise InputError(turn.why_not)
                if train_on == "all" and not is_chosen:
                    raise InputError(turn.why_not)  # its span must be known to leave it out
                continue
            for place in range(border[turn.start], len(encoded.tokens)):
                if encoded.offsets[place][0] >= turn.end:
                    break
                trained[place] = is_chosen
            without_end += is_chosen and not turn.has_end_token
        if trained:
            trained[0] = False
        return EncodedSample(
            tuple(encoded.tokens),
            tuple(trained),
            origin,
            without_end_token=without_end,
            control_tokens_in_text=render.control_tokens_in_text,
            lost_characters=encoded.unknown + self.template.control_tokens.lost_characters(render.text),
        )


def _trained_turns(messages: Sequence[Message], train_on: TrainOn) -> set[int]:
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    by_run = set(turns[-1:] if train_on == "last_assistant" else turns)
    for index, message in enumerate(messages):
        if message.trained and message.role != "assistant":
            raise InputError(f"turn {index + 1} ({message.role}) is marked as trained; only the assistant's can be")
    return {
        index for index in turns if messages[index].trained or (messages[index].trained is None and index in by_run)
    }


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many entries both begin with."""
    same = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(same, min(len(one), len(other)))


def _untrained(message: Message) -> Message:
    return replace(message, trained=False) if message.role == "assistant" else message


def _first_trained(encoded: EncodedSample) -> int:
    return encoded.trained.index(True) if True in encoded.trained else len(encoded)


def _cuts(render: Render) -> list[int]:
    return sorted({turn.start for turn in render.turns if turn.start})


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """The conversation with `system` as its system message in place of its own (None: as it is; "": none)."""
    if system is None:
        return tuple(messages)
    rest = [message for message in messages if message.role != "system"]
    return (Message("system", system), *rest) if system else tuple(rest)


_KEPT_ENCODERS = 4
_ENCODERS: dict[int, tuple[str, PreTrainedTokenizerBase, Encoder]] = {}


def encoder_for(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The encoder of a tokenizer, made once and again when its template or tokens change."""
    state = f"{tokenizer.chat_template!r} {tokenizer.special_tokens_map!r} {len(tokenizer)}"
    known = _ENCODERS.get(id(tokenizer))
    if known is not None and known[0] == state:
        return known[2]
    encoder = Encoder(tokenizer)
    _ENCODERS.pop(id(tokenizer), None)
    while len(_ENCODERS) >= _KEPT_ENCODERS:
        del _ENCODERS[next(iter(_ENCODERS))]
    # The tokenizer is kept too, so that its id stays its own.
    _ENCODERS[id(tokenizer)] = (state, tokenizer, encoder)
    return encoder


def encode(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn = "assistant",
    system: str | None = None,
) -> EncodedSample:
    """One sample -> its tokens and which of them are trained.

    Args:
        sample: a conversation, written with the tokenizer's own chat template; a preference pair, of which the
            answers are trained; or plain text, of which every token is trained and an end-of-text token added.
        tokenizer: a fast tokenizer.
        train_on: "assistant": every turn of the assistant with its end-of-turn token; "last_assistant": the
            last one only; "all": every token. `Message.trained` overrides it for its turn.
        system: replaces the conversation's system message ("": removes it; None: leaves it).

    Raises:
        InputError: the template refuses the conversation, or what is the assistant's cannot be known for
            certain. The message names the sample's file and line.
    """
    return encoder_for(tokenizer).encode(sample, train_on, system)


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Tools = ()) -> list[int]:
    """The turns so far (and what tools there are) -> exactly the token ids that generation is fed.

    They equal the tokens before the answer in the training sample that goes on from these turns.

    Raises:
        InputError: there are no turns, or the template refuses them.
    """
    return encoder_for(tokenizer).encode_prompt(messages, tools)


def cut_to(sample: EncodedSample, tokens: int) -> EncodedSample:
    """The first `tokens` tokens; what ended the sample is gone, so no end token is trained after a cut answer."""
    return replace(sample, tokens=sample.tokens[:tokens], trained=sample.trained[:tokens], is_cut=True, lost_end=True)
