"""`fitune train`: a real run on the bundled model, what it leaves, how it stops and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import STEPS, TrainedRun, call

from fitune.adapters.lora import read_base


def test_a_run_learns_and_leaves_its_folder(trained: TrainedRun) -> None:
    facts = trained.facts
    assert facts["run"] == str(trained.folder)
    assert facts["steps"] == STEPS
    assert facts["final_loss"] < facts["first_loss"]
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert facts["sha256"] == summary["sha256"]
    assert facts["peak_bytes"] > 0
    assert facts["planned_peak_bytes"] > 0
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert read_base(trained.folder / "adapter") == summary["base"]
    assert "Plan and measurement" in (trained.folder / "report.html").read_text()


def test_the_evaluation_is_base_against_tuned(trained: TrainedRun) -> None:
    found = trained.facts["evaluation"]
    assert found["samples"] == 2
    assert found["tuned"]["loss"]["value"] < found["base"]["loss"]["value"]
    # The evaluation's loss is the validation loss, computed another way: unpacked, in eval mode.
    assert found["tuned"]["loss"]["value"] == pytest.approx(trained.facts["validation_loss"], rel=0.02)


def test_a_second_run_does_not_write_over_the_first(trained: TrainedRun) -> None:
    code, out, err = call("train", trained.run_file, f"output={trained.folder}", "--json")
    assert (code, out) == (2, "")
    assert "holds a run already" in err


def test_what_people_see(workplace: Path, trained: TrainedRun) -> None:
    folder = workplace / "seen"
    code, out, err = call("train", workplace / "run.yaml", f"output={folder}", "train.steps=2", "evaluate.task=none")
    assert code == 0, err
    for said in ("12 read; 10 train, 2 validation", "Plan: qlora on bundled", "It fits:", "Trained\n",
                 f"fitune chat {folder}", f"fitune evaluate {folder}", f"fitune merge {folder}"):  # fmt: skip
        assert said in out
    assert "step 2/2, loss" in err
    assert "Warning" not in err


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused(workplace: Path, tmp_path: Path) -> None:
    code, out, err = call(
        "train", workplace / "run.yaml", f"output={tmp_path / 'run'}", "train.micro_batch=4096", "--json"
    )
    assert (code, out) == (2, "")
    assert "It does not fit:" in err
    assert "--force" in err
    assert not (tmp_path / "run").exists()


BAD = {"train.learning_rte=1e-4": "did you mean learning_rate?", "train.steps=many": "train.steps"}


@pytest.mark.parametrize(("override", "said"), BAD.items())
def test_settings_that_cannot_be(workplace: Path, override: str, said: str) -> None:
    code, out, err = call("train", workplace / "run.yaml", override)
    assert (code, out) == (2, "")
    assert said in err


def test_a_broken_line_is_named(workplace: Path, tmp_path: Path) -> None:
    lines = (workplace / "sums.jsonl").read_text().splitlines()
    lines[4] = lines[4][:-3]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run.yaml").write_text("data:\n  train: sums.jsonl\n")
    code, out, err = call("train", tmp_path / "run.yaml", "--json")
    assert (code, out) == (2, "")
    assert "sums.jsonl" in err
    assert "line 5" in err
    assert "Traceback" not in err


def test_questions_for_the_evaluation_are_checked_before_training(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.sqlite").write_bytes(b"")
    code, _, err = call(
        "train", workplace / "run.yaml", f"output={tmp_path / 'run'}", "evaluate.task=sql",
        f"evaluate.database={tmp_path / 'empty.sqlite'}", "--json",
    )  # fmt: skip
    assert code == 2
    assert "is empty (0 bytes)" in err
    assert not (tmp_path / "run").exists()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    code, _, err = call("train", tmp_path / "none.yaml")
    assert code == 2
    assert "none.yaml" in err
    (tmp_path / "run.yaml").write_text("data:\n  train: none.jsonl\n")
    code, _, err = call("train", tmp_path / "run.yaml")
    assert code == 2
    assert "none.jsonl: no such file" in err


def test_resuming_needs_a_run(workplace: Path, tmp_path: Path) -> None:
    code, _, err = call("train", workplace / "run.yaml", "--resume")
    assert code == 2
    assert "output=FOLDER" in err
    code, _, err = call("train", workplace / "run.yaml", f"output={tmp_path / 'none'}", "--resume", "--json")
    assert code == 2
    assert "there is no checkpoint to go on from" in err


def fitune(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fitune", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("again", ["--resume", "the same command"])
def test_control_c_saves_and_the_resumed_run_is_the_uninterrupted_one(
    workplace: Path, trained: TrainedRun, again: str
) -> None:
    folder = workplace / f"stopped, {again}"
    process = fitune("train", workplace / "run.yaml", f"output={folder}", "--json")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert "everything is saved" in err
    assert f"fitune train {folder}/config.yaml --resume" in err
    assert "Traceback" not in err
    code, _, err = call("chat", folder, "--prompt", "x")
    assert code == 2
    assert "--resume" in err
    command = (
        [folder / "config.yaml", "--resume"] if again == "--resume" else [workplace / "run.yaml", f"output={folder}"]
    )
    process = fitune("train", *command, "--json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "going on from step-" in err
    assert json.loads(out)["sha256"] == trained.facts["sha256"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, STEPS + 1))
