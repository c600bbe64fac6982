"""The starter file: complete, loadable, and every line of it usable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fitune import config
from fitune.config import RunConfig
from fitune.config.allowed import field_paths
from fitune.config.schema import DataSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.jsonl", "test.jsonl", "general.jsonl", "shop.sqlite", "odd: name.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def load(folder: Path, text: str) -> RunConfig:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return config.load(folder / "run.yaml")


def test_it_loads_as_the_defaults(folder: Path) -> None:
    assert load(folder, config.starter_file()) == RunConfig(data={"train": str(folder / "train.jsonl")})


def test_it_names_every_field_once_with_its_meaning() -> None:
    lines = config.starter_file().splitlines()
    names = [match[1] for line in lines if (match := re.match(r"\s*#?(?:- )?([a-z_]+):( |$)", line))]
    expected = [path.rpartition(".")[2] for path in field_paths()] + list(DataSource.model_fields)
    assert sorted(names) == sorted([*expected, "data", "lora", "train", "evaluate"])
    assert all(len(line) <= 110 for line in lines)


def commented_fields() -> list[int]:
    return [at for at, line in enumerate(config.starter_file().splitlines()) if re.match(r"\s*#[a-z_]+: ", line)]


@pytest.mark.parametrize("at", commented_fields())
def test_every_commented_line_can_be_uncommented(folder: Path, at: int) -> None:
    """Alone, with what the field needs beside it: the file's examples and defaults cannot rot."""
    (folder / "runs" / "first").mkdir(parents=True, exist_ok=True)
    lines = config.starter_file().splitlines()
    lines[at] = lines[at].replace("#", "", 1)
    beside = {
        "validate_every_steps": ["validation"],
        "score_every_steps": ["validation"],
        "early_stopping_patience": ["validate_every_steps", "validation"],
        "data": ["task"],
        "database": ["data", "task"],
    }
    name = lines[at].strip().partition(":")[0]
    text = "\n".join(lines)
    for needed in beside.get(name, []):
        text = text.replace(f"  #{needed}: none", f"  {needed}: sql" if name == "database" else f"  {needed}: text")
        text = text.replace(f"  #{needed}: ", f"  {needed}: ", 1)
    assert load(folder, text)


def test_what_is_chosen_is_written_and_quoted(folder: Path) -> None:
    read = load(folder, config.starter_file(model="no", data="odd: name.json", method="full"))
    assert (read.model, read.method) == ("no", "full")
    assert read.data.train[0].path == str(folder / "odd: name.json")
