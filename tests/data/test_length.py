from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from fitune.data import EncodedSample, Message, Sample, encode, encoder_for, fit_length
from fitune.data.length import fit_or_split
from fitune.errors import InputError

LONG = (
    Message("system", "Be brief."),
    Message("user", "first question " * 20),
    Message("assistant", "first answer " * 20),
    Message("user", "start " + "second question " * 20 + "end"),
    Message("assistant", "second answer " * 20),
)


def cut(tokenizer: Any, messages: tuple[Message, ...], max_tokens: int) -> tuple[str, EncodedSample, str]:
    fitted = fit_length(Sample(messages), encoder_for(tokenizer), max_tokens, "cut")
    assert fitted.encoded is not None
    assert len(fitted.encoded) <= max_tokens
    assert fitted.encoded.is_cut
    return tokenizer.decode(list(fitted.encoded.tokens)), fitted.encoded, fitted.note


def test_cut_takes_the_oldest_exchange_first(smollm2_tokenizer: Any) -> None:
    text, encoded, note = cut(smollm2_tokenizer, LONG, 150)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nstart second")
    assert text.endswith("second answer <|im_end|>\n")
    assert encoded.trained_tokens > 0
    assert note.endswith("the oldest 1 of 2 exchanges cut")


def test_cut_then_takes_the_questions_beginning(smollm2_tokenizer: Any) -> None:
    text, encoded, note = cut(smollm2_tokenizer, LONG, 90)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "start" not in text.replace("<|im_start|>", "")
    assert "question end<|im_end|>" in text
    assert text.endswith("second answer <|im_end|>\n")
    assert encoded.without_end_token == 0
    assert "the question's first" in note


def test_cut_at_last_takes_the_answers_end_with_its_end_token(smollm2_tokenizer: Any) -> None:
    text, encoded, note = cut(smollm2_tokenizer, LONG, 60)
    assert "question end<|im_end|>" in text
    assert len(encoded) == 60
    assert encoded.trained[-1]
    trained = [token for token, flag in zip(encoded.tokens, encoded.trained, strict=True) if flag]
    assert smollm2_tokenizer.eos_token_id not in trained
    assert note.endswith("the answer's end cut, with its end-of-turn token")


def test_what_cannot_be_cut_is_refused(smollm2_tokenizer: Any) -> None:
    messages = (Message("system", "long " * 100), *LONG[1:])
    with pytest.raises(InputError, match="cannot be cut to 60: what must stay before the answer"):
        fit_length(Sample(messages), encoder_for(smollm2_tokenizer), 60, "cut")


def test_cut_text_has_no_end_token(smollm2_tokenizer: Any) -> None:
    whole = encode(Sample(text="word " * 50), smollm2_tokenizer)
    fitted = fit_length(Sample(text="word " * 50), encoder_for(smollm2_tokenizer), 20, "cut")
    assert fitted.encoded is not None
    assert fitted.encoded.tokens == whole.tokens[:20]


@pytest.mark.parametrize("words", [3, 17, 18, 19, 60])
def test_a_split_text_trains_every_token_once(smollm2_tokenizer: Any, words: int) -> None:
    sample = Sample(text="word " * words)
    whole = encode(sample, smollm2_tokenizer)
    parts = [fitted.encoded for fitted in fit_or_split(sample, encoder_for(smollm2_tokenizer), 20, "split")]
    assert all(part is not None and 2 <= len(part) <= 20 for part in parts)
    trained = [token for part in parts if part for token, flag in zip(part.tokens, part.trained, strict=True) if flag]
    assert trained == list(whole.tokens[1:])
    for before, after in pairwise(parts):
        assert before is not None
        assert after is not None
        assert after.tokens[0] == before.tokens[-1]
        assert not after.trained[0]
    assert len(parts) == 1 or sum(len(part) == 20 for part in parts if part) >= len(parts) - 1


def test_conversations_are_not_split(smollm2_tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r'"drop" or "cut" \("split" is for plain text\)'):
        fit_or_split(Sample(LONG), encoder_for(smollm2_tokenizer), 20, "split")
    assert len(fit_or_split(Sample(LONG), encoder_for(smollm2_tokenizer), 2000, "split")) == 1
