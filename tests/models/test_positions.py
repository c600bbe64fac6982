"""Rows are no longer than a model has positions."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PretrainedConfig

from fitune.config import load
from fitune.errors import InputError
from fitune.models.positions import check_positions, positions_of
from fitune.train.run import prepare_run
from tiny_models import config_of, gemma3, model_of, tokenizer


def test_positions_are_those_of_the_text_part() -> None:
    assert positions_of(config_of("llama")) == config_of("llama").max_position_embeddings
    whole = gemma3().config
    assert positions_of(whole) == whole.text_config.max_position_embeddings
    whole.text_config.max_position_embeddings = 64
    check_positions(64, whole, "it")
    with pytest.raises(InputError, match="65 is more than the 64 positions of it"):
        check_positions(65, whole, "it")


def test_a_model_may_have_no_limit() -> None:
    check_positions(1 << 30, PretrainedConfig(), "it")


def test_a_run_is_refused_before_its_data_are_read(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    limit = model.config.max_position_embeddings
    (tmp_path / "data.jsonl").write_text("no record\n")
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {tmp_path / 'model'}\ndata: {{train: {tmp_path / 'data.jsonl'}, max_tokens: {limit + 1}}}\n"
    )
    with pytest.raises(InputError, match=rf"data\.max_tokens: {limit + 1} is more than the {limit} positions"):
        prepare_run(load(run))
