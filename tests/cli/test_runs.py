"""`fitune runs` on real runs of a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import call, facts_of

from tiny_models import write_model, write_questions


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two finished runs, of ranks 4 and 8, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs-listed")
    write_model(folder / "model")
    write_questions(folder / "train.jsonl")
    before = os.environ.get("FITUNE_CACHE")
    os.environ["FITUNE_CACHE"] = str(folder / "cache")
    (folder / "run.yaml").write_text(
        f"model: {folder / 'model'}\ndata:\n  train: train.jsonl\n  validation: 0.2\n  max_tokens: 256\n"
        "train:\n  steps: 3\n  threads: 1\n"
    )
    for rank in (4, 8):
        code, _, err = call(
            "train", folder / "run.yaml", f"output={folder / 'runs' / f'rank-{rank}'}", f"lora.rank={rank}"
        )
        assert code == 0, err
    stopped = folder / "runs" / "deep" / "stopped"
    stopped.mkdir(parents=True)
    finished = folder / "runs" / "rank-4"
    for name in ("config.yaml", "plan.json"):
        (stopped / name).write_bytes((finished / name).read_bytes())
    first = (finished / "metrics.jsonl").read_text().splitlines()[0]
    (stopped / "metrics.jsonl").write_text(first + '\n{"step": 2, "lo')  # killed while it wrote
    yield folder / "runs"
    del os.environ["FITUNE_CACHE"]
    if before is not None:
        os.environ["FITUNE_CACHE"] = before


def test_list(runs: Path) -> None:
    found = {Path(run["run"]).name: run for run in facts_of("runs", "list", runs)["runs"]}
    assert set(found) == {"rank-4", "rank-8", "stopped"}
    assert {name: run["state"] for name, run in found.items()} == {
        "rank-4": "finished", "rank-8": "finished", "stopped": "stopped",
    }  # fmt: skip
    assert [found[name]["steps"] for name in ("rank-4", "stopped")] == [3, 1]
    assert found["stopped"]["of_steps"] == 3
    assert found["rank-4"]["validation_loss"] > 0
    code, out, _ = call("runs", "list", runs)
    assert code == 0
    assert "1 of 3" in out
    assert "qlora" in out
    code, _, err = call("runs", "list", runs / "none")
    assert (code, "no such folder" in err) == (2, True)


def test_show(runs: Path) -> None:
    facts = facts_of("runs", "show", runs / "rank-4")
    assert facts["config"]["lora"]["rank"] == 4
    assert facts["summary"]["sha256"]
    code, out, _ = call("runs", "show", runs / "rank-4")
    assert code == 0
    for words in ("finished", "train.jsonl", "peak memory", "versions", facts["summary"]["sha256"]):
        assert words in out
    assert "--resume" in call("runs", "show", runs / "deep" / "stopped")[1]
    code, _, err = call("runs", "show", runs)
    assert (code, "no run folder" in err) == (2, True)


def test_diff(runs: Path) -> None:
    facts = facts_of("runs", "diff", runs / "rank-4", runs / "rank-8")
    assert facts["settings"] == {"lora.rank": [4, 8]}
    assert facts["data"] == facts["machine"] == {}
    assert {"final_loss", "sha256"} <= set(facts["results"])
    code, out, _ = call("runs", "diff", runs / "rank-4", runs / "rank-8")
    assert code == 0
    assert "lora.rank" in out
    assert call("runs", "diff", runs / "rank-4", runs / "rank-4")[1] == "They do not differ.\n"


HOLDING = "import sys, time; from pathlib import Path; from fitune.train.run_folder import RunFolder\n" \
    "folder = RunFolder(Path(sys.argv[1])); folder.lock(); print('held', flush=True); time.sleep(60)"  # fmt: skip


def test_a_run_that_goes_on_is_running(runs: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(runs / "deep" / "stopped")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        states: dict[str, Any] = {
            Path(run["run"]).name: run["state"] for run in facts_of("runs", "list", runs)["runs"]
        }
        other.kill()
    assert states == {"rank-4": "finished", "rank-8": "finished", "stopped": "running"}
    assert json.loads((runs / "rank-4" / "plan.json").read_text())
