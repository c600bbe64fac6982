"""`dump` writes what `load` reads back as the same config."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitune import config
from fitune.config import RunConfig

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
LONG_WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "模型 no: #1.jsonl").write_text("{}")
    return tmp_path


def again(folder: Path, made: RunConfig) -> RunConfig:
    path = folder / "again.yaml"
    path.write_text(config.dump(made), encoding="utf-8", newline="")
    return config.load(path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "full", "train": {"learning_rate": 1e-5}},
        {"train": {"steps": 7, "learning_rate": 1e-17, "betas": (0.1, 0.99999999999)}},
        {"lora": {"targets": ("q_proj", "v_proj"), "rslora": True}, "seed": 2**32 - 1},
        {"model": "no", "evaluate": {"batch": 3}},
        {"model": "1e-4"},
        {"lora": {"targets": ("a\x85", "two\nlines \r\n", "tab\t", " edge ", "# no comment", "a\u2028b", "é😀")}},
        {"model": "2001-01-01"},
    ],
)
def test_a_dumped_config_loads_as_itself(folder: Path, fields: dict) -> None:
    made = RunConfig(data={"train": [str(folder / "模型 no: #1.jsonl")], "validation": 0.1}, **fields)
    assert again(folder, made) == made


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate=st.floats(1e-300, 0.999),
    weight=st.floats(1e-9, 1000),
    system=st.none() | LONG_WORDS,
    columns=st.dictionaries(WORDS, WORDS, max_size=3),
    targets=st.lists(WORDS, min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_values_survive(
    folder: Path, rate: float, weight: float, system: str | None, columns: dict, targets: list[str], seed: int
) -> None:
    source = {"path": str(folder / "train.jsonl"), "weight": weight, "columns": columns}
    made = RunConfig(
        data={"train": [source], "system": system},
        train={"learning_rate": rate},
        lora={"targets": targets},
        seed=seed,
    )
    assert again(folder, made) == made


def test_a_loaded_file_dumps_to_text_that_stands_alone(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Paths become absolute, so that the dump works from any folder."""
    (folder / "run.yaml").write_text("data: {train: train.jsonl}\noutput: runs/x\n")
    read = config.load(folder / "run.yaml")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "copy.yaml").write_text(config.dump(read))
    assert config.load(elsewhere / "copy.yaml") == read
