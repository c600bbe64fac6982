"""A run that several processes share, started as users start it: by torchrun."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_runs import STEPS, adapter_bits

from tiny_models import distance

pytestmark = pytest.mark.slow


def write_run_file(place: Path, folder: Path, dropout: float) -> Path:
    settings = {
        "model": str(place / "model"), "output": str(folder / "run"), "method": "lora",
        "data": {"train": str(place / "train.jsonl"), "max_tokens": 256, "validation": 0.1},
        "lora": {"dropout": dropout},
        "train": {
            "steps": STEPS, "micro_batch": 1, "accumulation": 3, "learning_rate": 0.01, "threads": 1,
            "save_every_steps": 2, "validate_every_steps": 3, "compute": "float32",
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return path


def start(run_file: Path, processes: int, *arguments: str) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if processes == 1:
        launch = []
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "fitune", "train", str(run_file), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_the_same_however_many_processes_share_it(place: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        out = finished(start(write_run_file(place, tmp_path / str(count), 0.0), count))
        assert out.count("Trained") == 1
        assert ("processes" in out) == (count > 1)
    one, two = (lines_of(tmp_path / name) for name in "12")
    assert len(one) == len(two) == STEPS + 2
    for a, b in zip(one, two, strict=True):
        name = "loss" if "loss" in a else "validation_loss"
        assert b[name] == pytest.approx(a[name], rel=1e-4)
        assert b.get("tokens") == a.get("tokens")
    adapters = [load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in "12"]
    assert all(distance(adapters[1][name], value) < 1e-2 for name, value in adapters[0].items())


def test_a_stopped_run_of_two_processes_goes_on_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    """With dropout: each process has random numbers of its own, and finds them again."""
    finished(start(write_run_file(place, tmp_path / "whole", 0.2), 2))
    run_file = write_run_file(place, tmp_path / "stopped", 0.2)
    process = start(run_file, 2)
    metrics = tmp_path / "stopped" / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (tmp_path / "stopped" / "run" / "summary.json").exists()
    refused = start(run_file, 1, "--resume")
    assert "in 2 processes" in refused.communicate(timeout=300)[1]
    finished(start(run_file, 2, "--resume"))
    assert adapter_bits(tmp_path / "stopped" / "run") == adapter_bits(tmp_path / "whole" / "run")
    told = [{key: one[key] for key in one if key in ("step", "loss")} for one in lines_of(tmp_path / "stopped")]
    assert told == [{key: one[key] for key in one if key in ("step", "loss")} for one in lines_of(tmp_path / "whole")]


def test_more_processes_than_micro_batches_are_refused(place: Path, tmp_path: Path) -> None:
    process = start(write_run_file(place, tmp_path, 0.0), 2, "train.accumulation=1")
    assert "2 processes share the micro-batches of a step, and there are 1" in process.communicate(timeout=300)[1]
    assert process.returncode != 0
