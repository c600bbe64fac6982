"""`fitune init` writes a run file that loads, and never over another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fitune import cli, config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text("{}")
    return tmp_path


def test_it_writes_a_file_that_loads(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["init", "--data", "data/mine.jsonl", "--method", "lora", "--model", "some/name"]) == 0
    assert capsys.readouterr().out == "Wrote run.yaml.\nNext: fitune plan run.yaml\n"
    read = config.load(folder / "run.yaml")
    assert (read.method, read.model) == ("lora", "some/name")
    assert read.data.train[0].path == str(folder / "data" / "mine.jsonl")
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["run.yaml"]


def test_the_data_is_found_from_another_folder(folder: Path) -> None:
    (folder / "runs").mkdir()
    assert cli.run(["init", "runs/first.yaml", "--data", "data/mine.jsonl"]) == 0
    read = config.load(folder / "runs/first.yaml")
    assert Path(read.data.train[0].path).samefile(folder / "data/mine.jsonl")


def test_without_data_it_says_where_to_put_it(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["init"]) == 0
    assert str(folder / "train.jsonl") in capsys.readouterr().out
    (folder / "train.jsonl").write_text("{}")
    assert config.load(folder / "run.yaml").model == "bundled"


def test_it_does_not_write_over_a_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "run.yaml").write_text("mine")
    assert cli.run(["init"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / "run.yaml").read_text() == "mine"
    assert cli.run(["init", "--force"]) == 0
    assert (folder / "run.yaml").read_text() != "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "none.jsonl"], "--data none.jsonl: no such file"),
        (["data"], "data: is a folder"),
        (["none/run.yaml"], "there is no folder"),
        (["/proc/run.yaml"], "/proc/run.yaml: cannot be written"),
    ],
)
def test_what_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], said: str) -> None:
    assert cli.run(["init", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_recommended_settings_are_filled_in(folder: Path) -> None:
    data, model = ("--data", "data/mine.jsonl"), ("--model", "codellama/CodeLlama-13b-hf")
    assert cli.run(["init", *data, *model, "--recommended"]) == 0
    read = config.load(folder / "run.yaml")
    assert (read.lora.rank, read.lora.alpha, read.lora.targets) == (64, 32.0, ("q_proj", "v_proj"))
    assert read.train.learning_rate == 2e-4
    assert "DB-GPT-Hub" in (folder / "run.yaml").read_text()
    assert cli.run(["init", "full.yaml", *data, "--method", "full", "--recommended"]) == 0
    assert config.load(folder / "full.yaml").train.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "some/name"], "the size of this model is not known"),
        (["--model", "qwen3-32b", "--method", "full"], "no settings for method full"),
    ],
)
def test_what_cannot_be_recommended(
    folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], said: str
) -> None:
    assert cli.run(["init", "--recommended", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "run.yaml").exists()
