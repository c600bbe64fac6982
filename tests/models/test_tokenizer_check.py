from __future__ import annotations

import json
from pathlib import Path

import pytest

from fitune.errors import InputError
from fitune.models.folder import FolderSource
from fitune.models.tokenizer_check import check_tokenizer
from tiny_models import tokenizer, write_model


def test_fewer_tokens_than_rows_is_usual() -> None:
    made = tokenizer()
    assert check_tokenizer(made, len(made)) == ([], [])
    assert check_tokenizer(made, len(made) + 61) == ([], [])


def test_ordinary_tokens_without_a_row() -> None:
    (problem,), warnings = check_tokenizer(tokenizer(), 200)
    assert warnings == []
    assert "does not match the embedding" in problem
    assert "(id 200)" in problem
    assert "resize_token_embeddings" in problem


@pytest.mark.parametrize("role", ["pad_token", "eos_token"])
def test_special_tokens_in_use_without_a_row(role: str) -> None:
    made = tokenizer()
    rows = len(made)
    made.add_special_tokens({role: "<new>"})
    (problem,), _ = check_tokenizer(made, rows)
    assert f"'<new>' (id {rows})" in problem


def test_tokens_of_the_template_without_a_row() -> None:
    made = tokenizer()
    rows = len(made)
    made.add_tokens(["<turn>", "<picture>"], special_tokens=True)
    made.chat_template = "<turn>" + made.chat_template
    (problem,), _ = check_tokenizer(made, rows)
    assert "'<turn>'" in problem
    assert "<picture>" not in problem


def test_a_token_that_only_odd_text_holds_is_a_warning() -> None:
    made = tokenizer()
    rows = len(made)
    made.add_tokens(["<picture>"], special_tokens=True)
    problems, (warning,) = check_tokenizer(made, rows)
    assert problems == []
    assert f"'<picture>' (id {rows}) without a row" in warning


def test_the_folder_refuses_or_warns(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vocab_size=259, pad_token_id=None, eos_token_id=None)
    assert FolderSource(folder).warnings() == []
    more = tokenizer()
    more.add_tokens(["<picture>"], special_tokens=True)
    more.save_pretrained(folder)
    assert len(FolderSource(folder).warnings()) == 1
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    with pytest.raises(InputError, match=r"does not match the embedding.*beyond its 100 rows"):
        FolderSource(folder).tokenizer()


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="the tokenizer is missing"):
        FolderSource(folder).tokenizer()
