"""Calls of tools in training: the assistant's call is trained to its end, the tool's answer never is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from test_chat_template import trained_texts

from fitune.data import Message, Sample, encode, encode_prompt
from fitune.data.conversation import ToolCall
from fitune.errors import InputError

# As Qwen2.5 documents its form, written anew.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif message.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}"
    "{% for call in message.tool_calls %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' '
    "+ (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
TALK = (
    Message("user", "Rain in Paris?"),
    Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Paris"}, "c1"),)),
    Message("tool", '{"rain": true}', name="weather", call_id="c1"),
    Message("assistant", "Yes."),
)


@pytest.fixture
def tokenizer(smollm2_tokenizer: Any) -> Any:
    changed = copy.deepcopy(smollm2_tokenizer)
    changed.chat_template = TEMPLATE
    return changed


def test_calls_and_answers_are_trained_and_results_are_not(tokenizer: Any) -> None:
    encoded = encode(Sample(TALK, tools=TOOLS), tokenizer)
    assert trained_texts(tokenizer, encoded.tokens, encoded.trained) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
        "Yes.<|im_end|>",
    ]
    assert encoded.without_end_token == 0
    whole = tokenizer.decode(list(encoded.tokens))
    assert '"name": "weather", "parameters"' in whole
    first = encoded.trained.index(True)
    assert encode_prompt(TALK[:1], tokenizer, TOOLS) == list(encoded.tokens[:first])
    last = encode(Sample(TALK, tools=TOOLS), tokenizer, "last_assistant")
    assert trained_texts(tokenizer, last.tokens, last.trained) == ["Yes.<|im_end|>"]


def test_results_may_be_written_as_json(tokenizer: Any) -> None:
    """As Llama 3.1's template does."""
    quoted = copy.deepcopy(tokenizer)
    quoted.chat_template = TEMPLATE.replace(
        "+ message.content + '\n</tool_response>", "+ (message.content | tojson) + '\n</tool_response>"
    )
    assert quoted.chat_template != TEMPLATE
    encoded = encode(Sample(TALK, tools=TOOLS), quoted)
    assert r'"{\"rain\": true}"' in quoted.decode(list(encoded.tokens))
    assert trained_texts(quoted, encoded.tokens, encoded.trained)[1] == "Yes.<|im_end|>"


def test_control_tokens_in_arguments_and_results_stay_text(tokenizer: Any) -> None:
    evil = "<|im_end|>"
    talk = (
        Message("user", "q"),
        Message("assistant", "", tool_calls=(ToolCall("weather", {"city": evil}),)),
        Message("tool", evil),
        Message("assistant", "Yes."),
    )
    encoded = encode(Sample(talk, tools=TOOLS), tokenizer)
    assert encoded.control_tokens_in_text == 2
    end = tokenizer.convert_tokens_to_ids(evil)
    assert list(encoded.tokens).count(end) == 5  # one a turn, and the tools'
    assert f'"city": "{evil}"' in tokenizer.decode(list(encoded.tokens))


def test_a_template_that_loses_calls_tools_or_turns_is_refused(smollm2_tokenizer: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"turn 2: the chat template does not write calls of tools \(weather\)"):
        encode(Sample(TALK), smollm2_tokenizer)
    with pytest.raises(InputError, match=r"does not write the tools' definitions \(weather\)"):
        encode(Sample((TALK[0], TALK[3]), tools=TOOLS), smollm2_tokenizer)
    silent = copy.deepcopy(smollm2_tokenizer)
    silent.chat_template = "{% for m in messages if m.role != 'system' %}" + (
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(InputError, match=r"turn 1 \(system\): the chat template leaves its text out"):
        encode(Sample((Message("system", "Be brief."), TALK[0], TALK[3])), silent)
    with pytest.raises(InputError, match=r"turn 1 \(system\): the chat template leaves its text out"):
        encode_prompt((Message("system", "Be brief."), TALK[0]), silent)
