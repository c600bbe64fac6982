"""The main job, run for real: the bundled model learns, and what it leaves behind is whole."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fitune.data.reading import read_samples

# A run beside others, on a slow machine, took 510 s.
pytestmark = pytest.mark.timeout(1800)


def quickstart(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fitune", "quickstart", "--json", *arguments],
        capture_output=True, text=True, timeout=1200, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("quick") / "run"
    done = quickstart("--quick", "--output", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "stdout": done.stdout, "stderr": done.stderr}


def test_quick_gains_thirty_points(quick: dict[str, Any]) -> None:
    accuracy = quick["execution_accuracy"]
    assert set(accuracy) == {"base", "tuned_values", "tuned_phrasings"}
    assert min(accuracy["tuned_values"], accuracy["tuned_phrasings"]) >= accuracy["base"] + 0.3


def test_quick_keeps_under_two_gigabytes(quick: dict[str, Any]) -> None:
    assert 0 < quick["peak_bytes"] < 2e9


def test_stdout_is_one_line_of_json(quick: dict[str, Any]) -> None:
    assert len(quick["stdout"].splitlines()) == 1


def test_the_run_folder_is_whole(quick: dict[str, Any]) -> None:
    run = Path(quick["run"])
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "summary.json", "report.html", "shop.sqlite"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < sum(losses[:5]) / 3


def test_nothing_held_out_was_trained(quick: dict[str, Any]) -> None:
    run = Path(quick["run"])
    sets = {name: read_samples(run / f"{name}.jsonl") for name in ("train", "unseen_values", "unseen_phrasings")}
    trained = {message.content for sample in sets["train"] for message in sample.messages if message.role != "system"}
    for name in ("unseen_values", "unseen_phrasings"):
        assert sets[name]
        for sample in sets[name]:
            question, query = sample.messages[-2].content, sample.messages[-1].content
            assert question not in trained
            assert query not in trained


def test_the_report_shows_sql_before_and_after(quick: dict[str, Any]) -> None:
    page = (Path(quick["run"]) / "report.html").read_text()
    assert page.count("SELECT") > 5
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    done = quickstart("--quick", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("kind", ["missing", "empty", "text"])
def test_a_database_that_is_none_is_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "shop.sqlite"
    if kind == "empty":
        sqlite3.connect(path).close()
        path.touch()
    if kind == "text":
        path.write_text("name,city\nAnna,Berlin\n" * 100)
    output = tmp_path / "run"
    done = quickstart("--db", str(path), "--output", str(output))
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()
