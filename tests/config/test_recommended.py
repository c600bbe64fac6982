"""Recommended settings: every row is a valid run, has a source, and reaches the models it is meant for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fitune import config
from fitune.config.recommended import METHODS, TABLE, Recommendation, recommendations
from fitune.models.preset_table import PRESETS

ROWS = [(f"{row.method}-{'-'.join(row.families) or 'any'}-{row.above:g}", row) for row in TABLE]


def values(read: config.RunConfig, names: list[str]) -> dict[str, Any]:
    return {name: getattr(getattr(read, name.partition(".")[0]), name.partition(".")[2]) for name in names}


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[name for name, _ in ROWS])
def test_a_row_is_a_run_file(row: Recommendation, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    text = config.starter_file(method=row.method, settings=row.settings, origin=row.source)
    (tmp_path / "run.yaml").write_text(text)
    read = config.load(tmp_path / "run.yaml")
    assert read.method == row.method
    assert values(read, list(row.settings)) == dict(row.settings)
    assert f"# The settings that are filled in: {row.source}\n" in text


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[name for name, _ in ROWS])
def test_a_row_says_where_it_is_from_and_whom_it_is_for(row: Recommendation) -> None:
    assert row.source.startswith("https://")
    assert row.note
    assert "train.learning_rate" in row.settings
    assert ("lora.rank" in row.settings) == (row.method != "full")
    if row.families:
        sizes = [preset.published for preset in PRESETS if preset.family in row.families]
        assert any(row.above < size <= row.up_to for size in sizes), "no model of this family has such a size"


def test_every_preset_has_settings_for_qlora() -> None:
    for preset in PRESETS:
        found = recommendations(preset.family, preset.published)
        assert any(row.method == "qlora" for row in found), preset.name
        assert [METHODS.index(row.method) for row in found] == sorted(METHODS.index(row.method) for row in found)


@pytest.mark.parametrize(
    ("family", "parameters", "method", "expected"),
    [
        # QLoRA (arXiv 2305.14314), appendix B.
        ("llama-2", 13.0e9, "qlora", {"rank": 64, "alpha": 16.0, "dropout": 0.1, "learning_rate": 2e-4}),
        ("llama-2", 69.0e9, "qlora", {"rank": 64, "alpha": 16.0, "dropout": 0.05, "learning_rate": 1e-4}),
        # DB-GPT-Hub's script for text-to-SQL.
        ("codellama", 13.0e9, "qlora", {"rank": 64, "alpha": 32.0, "targets": ("q_proj", "v_proj")}),
        ("codellama", 33.7e9, "qlora", {"dropout": 0.05, "learning_rate": 1e-4}),
        ("chatglm3", 6.2e9, "lora", {"rank": 8, "alpha": 32.0, "dropout": 0.1, "learning_rate": 5e-5}),
        ("gemma-3", 1.0e9, "qlora", {"rank": 16, "targets": "all-linear", "learning_rate": 2e-4}),
        ("smollm2", 1.7e9, "full", {"learning_rate": 3e-4}),
        (None, 7.0e9, "qlora", {"rank": 64, "learning_rate": 2e-4}),
    ],
)
def test_the_most_specific_comes_first(family: str | None, parameters: float, method: str, expected: dict) -> None:
    first = recommendations(family, int(parameters), method)[0]
    found = {name.partition(".")[2]: value for name, value in first.settings.items()}
    assert {name: found.get(name) for name in expected} == expected


def test_nothing_is_made_up() -> None:
    assert recommendations(None, 7_000_000_000, "lora") == ()
    assert recommendations("qwen3", 32_000_000_000, "full") == ()
