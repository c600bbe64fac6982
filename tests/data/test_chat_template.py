from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, THINKING, Family

from fitune.data import Message, Sample, encode, encode_prompt, encoder_for
from fitune.data.chat_template import ChatTemplate
from fitune.errors import InputError

CONTROL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "</s>",
    "<s>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
]
# Without surrogates, the three code points that are refused, and what SmolLM2's vocabulary cannot write:
# it lacks some bytes, which its tokenizer leaves out.
writable = st.one_of(
    st.characters(
        exclude_categories=["Cs"],
        exclude_characters="\ufdd0\ufdd1\ufdd2\x04\x06\x13\x14\x16\x1d",
        max_codepoint=0x3FFFF,
    ),
    st.characters(min_codepoint=0xC0000),
)
content = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *CONTROL,
                " ",
                "\n",
                "\n\n",
                "\t",
                "  ",
                "[/INST]",
                "assistant\n",
                "<|im_",
                "end|>",
                "é",
                "\uf8f0",
            ]
        ),
        st.text(writable, max_size=8),
        st.sampled_from(["hello", "你好", "🙂👩‍👩‍👧", "\u2028", "SELECT * FROM t;", "\r\n", "\u00a0"]),
    ),
    min_size=0,
    max_size=6,
).map("".join)
conversation = st.tuples(
    st.one_of(st.none(), content.filter(str.strip)),
    st.lists(st.tuples(content, content), min_size=1, max_size=3),
)


def messages_of(drawn: tuple[str | None, list[tuple[str, str]]], family: Family) -> list[Message]:
    system, turns = drawn
    messages = [Message("system", system)] if system and family.has_system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


def trained_texts(tokenizer: Any, tokens: tuple[int, ...], trained: tuple[bool, ...]) -> list[str]:
    """The text of every run of trained tokens."""
    runs: list[list[int]] = []
    for place, token in enumerate(tokens):
        if trained[place]:
            if not place or not trained[place - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]


@pytest.mark.parametrize("name", FAMILIES)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=conversation)
def test_trained_text_is_what_the_template_writes_for_the_answer(
    family_tokenizers: dict[str, Any], name: str, drawn: Any
) -> None:
    family, tokenizer = FAMILIES[name], family_tokenizers[name]
    messages = messages_of(drawn, family)
    encoded = encode(Sample(tuple(messages)), tokenizer)
    answers = [message.content for message in messages if message.role == "assistant"]
    expected = [family.written(answer) for answer in answers]
    assert trained_texts(tokenizer, encoded.tokens, encoded.trained) == expected
    assert encoded.without_end_token == 0
    # The whole is what the template renders, and the control tokens in it are the template's alone.
    turns = [{"role": message.role, "content": message.content} for message in messages]
    render = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(list(encoded.tokens), clean_up_tokenization_spaces=False) == render
    end = tokenizer.convert_tokens_to_ids(family.end)
    closed = sum(1 for place, token in enumerate(encoded.tokens) if encoded.trained[place] and token == end)
    assert closed == len(answers)
    # What generation is fed before each answer is what training puts before it.
    starts = [place for place in range(len(encoded)) if encoded.trained[place] and not encoded.trained[place - 1]]
    for start, index in zip(starts, [i for i, m in enumerate(messages) if m.role == "assistant"], strict=True):
        assert encode_prompt(messages[:index], tokenizer) == list(encoded.tokens[:start])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mask_shifted_by_one_would_be_found(family_tokenizers: dict[str, Any], name: str) -> None:
    family, tokenizer = FAMILIES[name], family_tokenizers[name]
    messages = [
        Message("user", "one"),
        Message("assistant", "two three"),
        Message("user", "four"),
        Message("assistant", "5"),
    ]
    encoded = encode(Sample(tuple(messages)), tokenizer)
    expected = [family.written("two three"), family.written("5")]
    assert trained_texts(tokenizer, encoded.tokens, encoded.trained) == expected
    for shifted in [(False, *encoded.trained[:-1]), (*encoded.trained[1:], False)]:
        assert trained_texts(tokenizer, encoded.tokens, shifted) != expected


@pytest.mark.parametrize("name", FAMILIES)
def test_without_control_tokens_in_the_data_the_tokens_are_the_tokenizers_own(
    family_tokenizers: dict[str, Any], name: str
) -> None:
    tokenizer = family_tokenizers[name]
    turns = [
        {"role": "user", "content": "How many  singers do we have?\n\n"},
        {"role": "assistant", "content": "SELECT count(*)\nFROM singer"},
        {"role": "user", "content": "你好 thanks"},
        {"role": "assistant", "content": "Bye 🙂"},
    ]
    encoded = encode(Sample(tuple(Message(**turn) for turn in turns)), tokenizer)
    # Generation tokenises the prompt alone. With this vocabulary that parts line ends differently in one family
    # ("\n\n" before an answer is one token, and two where the answer is there already): the prompt's way is right.
    if name != "llama3":
        assert list(encoded.tokens) == tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert list(encoded.tokens[: len(prompt)]) == prompt
    assert encoded.trained.index(True) == len(prompt)


def test_train_on_and_trained_choose_turns(smollm2_tokenizer: Any) -> None:
    messages = [
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
    ]

    def trained(messages: list[Message], train_on: Any) -> list[str]:
        encoded = encode(Sample(tuple(messages)), smollm2_tokenizer, train_on=train_on)
        return trained_texts(smollm2_tokenizer, encoded.tokens, encoded.trained)

    assert trained(messages, "assistant") == ["b<|im_end|>", "d<|im_end|>"]
    assert trained(messages, "last_assistant") == ["d<|im_end|>"]
    whole = encode(Sample(tuple(messages)), smollm2_tokenizer, train_on="all")
    assert whole.trained == (False, *[True] * (len(whole) - 1))
    messages[1] = Message("assistant", "b", trained=False)
    assert trained(messages, "assistant") == ["d<|im_end|>"]
    messages[1], messages[3] = (
        Message("assistant", "b", trained=True),
        Message("assistant", "d", trained=False),
    )
    assert trained(messages, "last_assistant") == ["b<|im_end|>"]
    with pytest.raises(InputError, match="only the assistant's"):
        trained([Message("user", "a", trained=True), Message("assistant", "b")], "assistant")


def test_data_control_tokens_are_text_and_counted(smollm2_tokenizer: Any) -> None:
    messages = (Message("user", "say <|im_end|>"), Message("assistant", "<|im_start|><|im_end|>"))
    encoded = encode(Sample(messages), smollm2_tokenizer)
    assert encoded.control_tokens_in_text == 3
    assert encoded.tokens.count(smollm2_tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert encoded.tokens.count(smollm2_tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


def test_system_is_replaced_or_removed(smollm2_tokenizer: Any) -> None:
    sample = Sample((Message("system", "old"), Message("user", "a"), Message("assistant", "b")))
    decode = smollm2_tokenizer.decode
    assert decode(list(encode(sample, smollm2_tokenizer).tokens)).startswith("<|im_start|>system\nold<|im_end|>")
    replaced = encode(sample, smollm2_tokenizer, system="new")
    assert decode(list(replaced.tokens)).startswith("<|im_start|>system\nnew<|im_end|>")
    removed = encode(sample, smollm2_tokenizer, system="")
    assert "old" not in decode(list(removed.tokens))


def test_a_template_that_refuses_is_quoted(family_tokenizers: dict[str, Any]) -> None:
    sample = Sample((Message("system", "x"), Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(InputError, match=r"refuses.*\(system, user, assistant\): System role not supported"):
        encode(sample, family_tokenizers["gemma"])


def test_a_prompt_that_the_render_does_not_hold_is_refused(smollm2_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = THINKING
    answers = ["<think>hm</think>b", "<think>so</think>d"]
    messages = (
        Message("user", "a"),
        Message("assistant", answers[0]),
        Message("user", "c"),
        Message("assistant", answers[1]),
    )
    with pytest.raises(InputError, match="train_on: last_assistant"):
        encode(Sample(messages), tokenizer)
    last = encode(Sample(messages), tokenizer, train_on="last_assistant")
    assert trained_texts(tokenizer, last.tokens, last.trained) == ["so</think>d<|im_end|>"]


def test_a_template_without_end_of_turn_is_noticed(smollm2_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
    )
    messages = (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
    )
    encoded = encode(Sample(messages), tokenizer)
    assert encoded.without_end_token == 1  # the last turn is closed, the first is not
    assert trained_texts(tokenizer, encoded.tokens, encoded.trained)[0].strip() == "b"


def test_default_template_ends_answers_with_eos(smollm2_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = None
    messages = (Message("system", "s"), Message("user", "a"), Message("assistant", "\n b "))
    encoded = encode(Sample(messages), tokenizer)
    assert trained_texts(tokenizer, encoded.tokens, encoded.trained) == ["\n b <|im_end|>"]
    assert tokenizer.decode(encode_prompt(messages[:2], tokenizer)) == "s\n\n### Instruction:\na\n\n### Response:\n"
    assert encoder_for(tokenizer).template.is_default
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a chat template nor an end-of-text token"):
        encoder_for(tokenizer)


def test_end_of_turn_token(family_tokenizers: dict[str, Any]) -> None:
    for name, family in FAMILIES.items():
        tokenizer = family_tokenizers[name]
        assert ChatTemplate(tokenizer).end_of_turn_id() == tokenizer.convert_tokens_to_ids(family.end)


def test_added_tokens_that_are_not_special_count_where_the_template_writes_them(
    smollm2_tokenizer: Any,
) -> None:
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=False), AddedToken("<think>", special=False)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    messages = (Message("user", "a<end_of_turn>"), Message("assistant", "<think>b<end_of_turn>"))
    encoded = encode(Sample(messages), tokenizer)
    end, think = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<think>"])
    assert encoded.tokens.count(end) == 2
    assert encoded.tokens.count(think) == 1
    assert trained_texts(tokenizer, encoded.tokens, encoded.trained) == ["<think>b<end_of_turn><end_of_turn>"]


def test_dates_are_fixed(smollm2_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + tokenizer.chat_template
    prompt = encode_prompt([Message("user", "a")], tokenizer)
    assert tokenizer.decode(prompt).startswith("Today: 26 Jul 2024\n")


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
def test_tokenizers_that_add_prefix_spaces(scheme: str) -> None:
    """Sentencepiece-style vocabularies; "always" and "legacy" put a space after every added token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *letters])}
    merges = [("▁", "h"), ("h", "i"), ("▁", "▁")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    backend.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = FAMILIES["llama2"].template
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "oh hi"}]
    turns += [{"role": "user", "content": "so"}, {"role": "assistant", "content": "bye"}]
    messages = [Message(**turn) for turn in turns]
    encoded = encode(Sample(tuple(messages)), tokenizer)
    assert list(encoded.tokens) == tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    texts = trained_texts(tokenizer, encoded.tokens, encoded.trained)
    assert [text.strip() for text in texts] == ["oh hi </s>", "bye </s>"]
    first = encoded.trained.index(True)
    assert encode_prompt(messages[:1], tokenizer) == list(encoded.tokens[:first])
    assert json.dumps(encoded.tokens)  # plain ints


def test_characters_that_the_vocabulary_lacks_are_counted(smollm2_tokenizer: Any) -> None:
    messages = (Message("user", "a\x04"), Message("assistant", "\U00040000 b"))
    assert encode(Sample(messages), smollm2_tokenizer).lost_characters == 2
    assert encode(Sample(text="\x1dx"), smollm2_tokenizer).lost_characters == 1


def test_a_real_sentencepiece_vocabulary_with_its_own_template(shared_data: Path) -> None:
    """Phi-3: a prefix space after every added token, and a template that asks right after the question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "vocab_gguf", gguf_file="ggml-vocab-phi-3.gguf")
    turns = [
        {"role": "user", "content": "Say <|end|> in one  word.\n"},
        {"role": "assistant", "content": "Hello 你好 </s>"},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": " Bye"},
    ]
    messages = [Message(**turn) for turn in turns]
    encoded = encode(Sample(tuple(messages)), tokenizer)
    texts = [text.strip() for text in trained_texts(tokenizer, encoded.tokens, encoded.trained)]
    assert texts == ["Hello 你好 </s><|end|>", "Bye<|end|>"]
    first = encoded.trained.index(True)
    assert encode_prompt(messages[:1], tokenizer) == list(encoded.tokens[:first])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert encoded.tokens.count(end) == 4
    assert encoded.control_tokens_in_text >= 1
