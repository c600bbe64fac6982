"""Every run file in examples/ works on the data that docs/recipes.md says it is for."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest

from fitune import cli
from fitune.config import load
from fitune.data.dataset import load_training_data
from fitune.models.find import find_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
LINES = 60


def first_lines(source: Path, target: Path) -> None:
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as lines:
        target.write_text("".join(itertools.islice(lines, LINES)), encoding="utf-8")


def first_entries(source: Path, target: Path) -> None:
    target.write_text(json.dumps(json.loads(source.read_text(encoding="utf-8"))[:LINES]), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, shared_data: Path) -> Path:
    for name in ("translation", "summarisation", "instructions", "reading", "preferences"):
        (tmp_path / name).mkdir()
    pairs = shared_data / "multi30k_de_en" / "raw"
    for ours, theirs in (("train", "train"), ("validation", "val"), ("test", "test_2016_flickr")):
        for language in ("de", "en"):
            first_lines(pairs / f"{theirs}.{language}.gz", tmp_path / f"{ours}.{language}.txt")
        code = cli.run(
            ["data", "convert", str(tmp_path / f"{ours}.de.txt"), str(tmp_path / "translation" / f"{ours}.jsonl"),
             "--answers", str(tmp_path / f"{ours}.en.txt"), "--instruction", "Translate into English."]
        )  # fmt: skip
        assert code == 0
    for name in ("train", "dev"):
        first_lines(shared_data / "scitldr" / f"{name}.jsonl", tmp_path / "summarisation" / f"{name}.jsonl")
    demo = shared_data / "llamafactory_demo"
    first_entries(demo / "alpaca_en_demo.json", tmp_path / "instructions" / "english.json")
    first_entries(demo / "alpaca_zh_demo.json", tmp_path / "instructions" / "chinese.json")
    first_entries(demo / "alpaca_en_demo.json", tmp_path / "reading" / "instructions.json")
    first_entries(demo / "dpo_en_demo.json", tmp_path / "preferences" / "pairs.json")
    shutil.copy(demo / "wiki_demo.txt", tmp_path / "reading" / "documents.txt")
    return tmp_path


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_its_data_can_be_trained_on(folder: Path, example: Path) -> None:
    run = folder / example.name
    shutil.copy(example, run)
    config = load(run)
    data = load_training_data(
        config.data, find_model("bundled").tokenizer(), config.seed, objective=config.train.objective
    )
    assert data.train
    assert data.validation
    assert data.report.end_token_share == 1.0 or data.report.cut


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_trains(folder: Path, example: Path) -> None:
    """Three steps, and for translation the scores of base and tuned on a test set; data as it is on the page."""
    run = folder / example.name
    text, count = re.subn(r"\bepochs: \d+", "steps: 3", example.read_text(encoding="utf-8"))
    assert count == 1
    run.write_text(text, encoding="utf-8")
    assert cli.run(["train", str(run), f"output={folder / 'run'}"]) == 0
    losses = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in entry for entry in losses) == 3
    assert any("validation_loss" in entry for entry in losses)
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()
    if "evaluate:" in text:
        scores = json.loads((folder / "run" / "evaluation.json").read_text())
        assert scores["samples"] == LINES
        assert {"base", "tuned"} <= set(scores)


def test_the_page_and_the_folder_agree() -> None:
    headings = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").count("\n## ")
    assert len(EXAMPLES) == headings == 5
