"""Masks with whole vocabularies of several makes: byte-level, sentencepiece with prefix blanks, tiktoken's."""

from __future__ import annotations

import base64
import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, MISTRAL
from test_chat_template import content, trained_texts

from fitune.data import Message, Sample, encode, encode_prompt
from fitune.models.baichuan import CHAT_TEMPLATE as BAICHUAN
from fitune.models.chatglm import CHAT_TEMPLATE as CHATGLM
from fitune.models.gguf_header import read_header
from fitune.models.gguf_tokenizer import build_tokenizer
from fitune.models.sentencepiece_tokenizer import USER_DEFINED, SentencePieceVocabulary
from fitune.models.tiktoken_tokenizer import TiktokenVocabulary

# Mistral Nemo's, without the blanks of the earlier ones (mistral-common, `InstructTokenizerV3` over Tekken).
MISTRAL_TEKKEN = MISTRAL.replace("'[INST] '", "'[INST]'").replace("' [/INST]'", "'[/INST]'").replace("' ' + ", "")


@dataclass(frozen=True)
class Real:
    """A vocabulary, the template to ask it with (None: its own), and the tokens that the template needs.

    Attributes:
        end: what closes an answer.
        keeps_blanks: whether what is decoded is what was encoded, blanks at its beginning too.
    """

    make: Callable[[Path], Any]
    end: str
    template: str | None = None
    special: tuple[str, ...] = ()
    keeps_blanks: bool = False


def gguf(name: str) -> Callable[[Path], Any]:
    return lambda data: build_tokenizer(read_header(data / "vocab_gguf" / f"ggml-vocab-{name}.gguf"))


def mistral_file(name: str) -> Path:
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package mistral-common, which carries Mistral's vocabularies, is not installed")
    return Path(found.submodule_search_locations[0]) / "data" / name


def sentencepiece(name: str) -> Callable[[Path], Any]:
    def make(data: Path) -> Any:
        from transformers import PreTrainedTokenizerFast

        vocabulary = SentencePieceVocabulary(mistral_file(name))
        # As the tokenizer.json of Mistral-7B-Instruct-v0.3 has them.
        symbols = [piece for piece, _, type_ in vocabulary.pieces if type_ == USER_DEFINED]
        tokenizer = vocabulary.tokenizer(symbols, begin=["<s>"])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")

    return make


def tekken(data: Path) -> Any:
    """The ids follow the vocabulary here, which has them first; nothing of what is tested depends on it."""
    from transformers import PreTrainedTokenizerFast

    found = json.loads(mistral_file("tekken_240911.json").read_text(encoding="utf-8"))
    kept = found["vocab"][: found["config"]["default_vocab_size"] - found["config"]["default_num_special_tokens"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tekken.tiktoken"
        path.write_bytes(b"\n".join(f"{entry['token_bytes']} {entry['rank']}".encode() for entry in kept))
        vocabulary = TiktokenVocabulary(path)
    assert base64.b64decode(kept[300]["token_bytes"]) in vocabulary.ranks
    special = {token: len(kept) + place for place, token in enumerate(("<s>", "</s>", "[INST]", "[/INST]"))}
    tokenizer = vocabulary.tokenizer(found["config"]["pattern"], special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


REAL = {
    "qwen2": Real(gguf("qwen2"), "<|im_end|>", keeps_blanks=True),
    "qwen2-llama3": Real(
        gguf("qwen2"), "<|eot_id|>", FAMILIES["llama3"].template, FAMILIES["llama3"].special, keeps_blanks=True
    ),
    "qwen2-gemma": Real(
        gguf("qwen2"), "<end_of_turn>", FAMILIES["gemma"].template, FAMILIES["gemma"].special, keeps_blanks=True
    ),
    "phi-3": Real(gguf("phi-3"), "<|end|>"),
    "phi-3-llama2": Real(gguf("phi-3"), "</s>", FAMILIES["llama2"].template, ("</s>",)),
    "baichuan": Real(gguf("baichuan"), "</s>", BAICHUAN, ("<reserved_106>", "<reserved_107>")),
    "baichuan-chatglm3": Real(
        gguf("baichuan"), "<|user|>", CHATGLM, ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")
    ),
    "mistral-v1": Real(sentencepiece("tokenizer.model.v1"), "</s>", MISTRAL),
    "mistral-v2": Real(
        sentencepiece("mistral_instruct_tokenizer_240216.model.v2"), "</s>", MISTRAL, ("[INST]", "[/INST]")
    ),
    "mistral-v3": Real(
        sentencepiece("mistral_instruct_tokenizer_240323.model.v3"), "</s>", MISTRAL, ("[INST]", "[/INST]")
    ),
    "mistral-v7": Real(
        sentencepiece("mistral_instruct_tokenizer_241114.model.v7"), "</s>", MISTRAL, ("[INST]", "[/INST]")
    ),
    "mistral-tekken": Real(tekken, "</s>", MISTRAL_TEKKEN, keeps_blanks=True),
}


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest, shared_data: Path) -> tuple[Real, Any]:
    found = REAL[request.param]
    tokenizer = found.make(shared_data)
    if found.template is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": list(found.special)})
        tokenizer.chat_template = found.template
        if tokenizer.bos_token is None or found.special[:1] == ("<bos>",):
            tokenizer.bos_token = found.special[0]
        if not found.special or found.end != "<|user|>":
            tokenizer.eos_token = found.end
    return found, tokenizer


def without_blanks(text: str) -> str:
    """Templates trim answers, and decoders of sentencepiece drop a blank here and set one there."""
    return "".join(text.split())


def faults(
    found: Real, tokenizer: Any, messages: tuple[Message, ...], tokens: tuple[int, ...], trained: tuple[bool, ...]
) -> list[str]:
    """What is wrong with a mask: each answer and what ends it is trained, after exactly what generation is fed."""
    end = tokenizer.convert_tokens_to_ids(found.end)
    starts = [place for place in range(len(tokens)) if trained[place] and not (place and trained[place - 1])]
    answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
    if len(starts) != len(answers):
        return [f"{len(starts)} runs of trained tokens for {len(answers)} answers"]
    wrong = []
    for start, index in zip(starts, answers, strict=True):
        if encode_prompt(messages[:index], tokenizer) != list(tokens[:start]):
            wrong.append(f"turn {index} does not begin where generation does")
        stop = next(place for place in range(start, len(tokens) + 1) if not (*trained, False)[place])
        if tokens[stop - 1] != end or end in tokens[start : stop - 1]:
            wrong.append(f"turn {index} does not end with its end token")
    texts = trained_texts(tokenizer, tokens, trained)
    expected = [messages[place].content + found.end for place in answers]
    if not found.keeps_blanks or "| trim" in (found.template or ""):
        texts, expected = list(map(without_blanks, texts)), list(map(without_blanks, expected))
    return wrong + [
        f"{text!r}, not {wanted!r}" for text, wanted in zip(texts, expected, strict=True) if text != wanted
    ]


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(drawn=st.lists(st.tuples(content, content), min_size=1, max_size=3))
def test_what_is_trained_is_the_answers_and_what_ends_them(real: tuple[Real, Any], drawn: Any) -> None:
    found, tokenizer = real
    messages = tuple(
        Message(role, text)  # type: ignore[arg-type]
        for turns in drawn
        for role, text in zip(("user", "assistant"), turns, strict=True)
    )
    encoded = encode(Sample(messages), tokenizer)
    assert encoded.without_end_token == 0
    if not encoded.lost_characters:
        assert faults(found, tokenizer, messages, encoded.tokens, encoded.trained) == []


def test_a_mask_shifted_by_one_is_found(real: tuple[Real, Any]) -> None:
    found, tokenizer = real
    messages = (Message("user", "one"), Message("assistant", "two three"))
    encoded = encode(Sample(messages), tokenizer)
    assert faults(found, tokenizer, messages, encoded.tokens, encoded.trained) == []
    for shifted in [(False, *encoded.trained[:-1]), (*encoded.trained[1:], False)]:
        assert faults(found, tokenizer, messages, encoded.tokens, shifted)
