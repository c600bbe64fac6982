"""Templates that leave the last answer open, and the many that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fitune.data.conversation import Message, Sample
from fitune.data.encoding import encode
from fitune.models.answer_end import end_last_answer
from fitune.models.find import find_model
from tiny_models import CHATML, tokenizer, write_model

OPEN = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def made(template: str | None) -> tuple[Any, list[int]]:
    """A tokenizer with GLM-4's roles, and the ids that it stops on."""
    found = tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|observation|>"]})
    found.chat_template = template
    return found, found.convert_tokens_to_ids(["<|im_end|>", "<|user|>", "<|observation|>"])


@pytest.mark.parametrize("template", [OPEN, OPEN + "\n"])
def test_the_last_answer_is_ended_as_inner_ones_are(template: str) -> None:
    changed, stops = made(template)
    assert end_last_answer(changed, stops) == "<|user|>"
    talk = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    plain, _ = made(template)
    turns = [{"role": message.role, "content": message.content} for message in talk]
    for count in range(1, 5):
        ended = "<|user|>" if count % 2 == 0 else ""
        for asked in (False, True):
            expected = plain.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=asked)
            found = changed.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=asked)
            assert found == expected + ("" if asked else ended)
    encoded = encode(Sample(messages=talk), changed)
    assert encoded.without_end_token == 0
    trained = [token for token, is_trained in zip(encoded.tokens, encoded.trained, strict=True) if is_trained]
    user = changed.convert_tokens_to_ids("<|user|>")
    assert trained == [*changed("b")["input_ids"], user, *changed("d")["input_ids"], user]
    assert end_last_answer(changed, stops) is None


@pytest.mark.parametrize(
    "template",
    [
        None,
        CHATML,
        OPEN.replace("message.content", "message.content + eos_token"),
        OPEN.replace("'|>\n'", "'>'").replace("'<|'", "'<'"),  # no added token opens a turn
        "{{ raise_exception('no') }}",
        "{{ messages | length }}",
    ],
)
def test_other_templates_stay(template: str | None) -> None:
    found, stops = made(template)
    assert end_last_answer(found, stops) is None
    assert found.chat_template == template


def test_only_a_token_that_generation_stops_on_ends_an_answer() -> None:
    found, stops = made(OPEN)
    assert end_last_answer(found, [stops[0], stops[2]]) is None
    assert found.chat_template == OPEN


def test_a_folder_says_what_was_added(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    plain, stops = made(OPEN)
    plain.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    source = find_model(str(folder))
    assert source.warnings() == [
        "the chat template does not end the last answer; <|user|>, on which the model stops, is added there"
    ]
    assert find_model(str(write_model(tmp_path / "other"))).warnings() == []
