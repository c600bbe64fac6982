"""Runs by what their folders say: where each stands, what came out, and how two of them differ."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fitune.errors import InputError
from fitune.train.checkpoint import list_checkpoints
from fitune.train.resuming import flat
from fitune.train.run_folder import RunFolder

# What two runs are compared by; a machine, its versions and its data are in the summary, which a run has at its end.
_RESULTS = ("steps", "final_loss", "validation_loss", "seconds", "peak_bytes", "planned_peak_bytes", "sha256")


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        state: "running", "finished", or "stopped" (it can be gone on with where there is a checkpoint).
        steps: taken so far; of_steps: planned (None: not known).
        loss, validation_loss, score: the last ones (`score`: a line of metrics.jsonl); None: there is none yet.
        config, summary, plan, evaluation: what the folder's files hold; empty where one is missing.
        checkpoints: their names, the oldest first.
    """

    path: Path
    state: str
    steps: int
    of_steps: int | None
    loss: float | None
    validation_loss: float | None
    began: float
    config: dict[str, Any]
    summary: dict[str, Any]
    plan: dict[str, Any]
    evaluation: dict[str, Any]
    checkpoints: tuple[str, ...] = field(default=())
    score: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON-able values."""
        return {**vars(self), "path": str(self.path), "checkpoints": list(self.checkpoints)}


def find_runs(folder: Path) -> list[RunFacts]:
    """The runs in a folder and in the folders below it, the oldest first.

    Raises InputError where there is no such folder.
    """
    if not folder.is_dir():
        raise InputError("no such folder", where=folder)
    paths = [path.parent for path in folder.rglob("config.yaml") if (path.parent / "plan.json").is_file()]
    return sorted((read_run(path) for path in paths), key=lambda run: (run.began, str(run.path)))


def read_run(path: Path) -> RunFacts:
    """One run by its folder. Raises InputError where it is none, or its files cannot be read."""
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        raise InputError("this is no run folder: there is no config.yaml in it", where=path)
    config = _read(folder.config_file)
    summary, plan = _read(folder.summary_file), _read(folder.plan_file)
    loss = validation = score = None
    steps = 0
    for entry in _metrics(folder.metrics_file):
        steps = max(steps, int(entry.get("step", 0)))
        loss = entry.get("loss", loss)
        validation = entry.get("validation_loss", validation)
        score = entry if "score" in entry else score
    is_running = _is_locked(path / ".lock")
    return RunFacts(
        path,
        "running" if is_running else "finished" if summary else "stopped",
        steps,
        next((item["value"] for item in plan.get("settings", []) if item["name"] == "steps"), None),
        loss,
        validation,
        folder.config_file.stat().st_mtime,
        config,
        summary,
        plan,
        _read(folder.evaluation_file),
        tuple(one.name for one in list_checkpoints(folder.checkpoints)),
        score,
    )


def differences(one: RunFacts, other: RunFacts) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What differs between two runs: of "settings", "data", "machine" and "results", (value of one, of the other)."""
    sides = (one, other)
    settings = _differing(*(flat({**side.config, "output": None}) for side in sides))
    data = _differing(*(_files(side) for side in sides))
    machine = _differing(*(flat(side.summary.get("machine", {})) for side in sides))
    results = _differing(*(_results(side) for side in sides))
    return {"settings": settings, "data": data, "machine": machine, "results": results}


def _results(run: RunFacts) -> dict[str, Any]:
    summary = {name: run.summary.get(name) for name in _RESULTS}
    scores = flat((run.score or {}).get("scores", {}), "score.")
    return {"state": run.state, **summary, "last_loss": run.loss, **scores, **flat(run.evaluation, "evaluation.")}


def _files(run: RunFacts) -> dict[str, Any]:
    report = run.summary.get("data", {})
    facts: dict[str, Any] = {f"{file['path']}": file["samples"] for file in report.get("files", [])}
    return facts | {name: report.get(name) for name in ("tokens", "trained_tokens", "train_samples") if report}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*one, *(name for name in other if name not in one)]
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read: {error}", where=path) from error
    if not isinstance(found, dict):
        raise InputError("is not what a run writes there", where=path)
    return found


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: the last one may be being written."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _is_locked(path: Path) -> bool:
    """Whether a process works in the folder."""
    if not path.is_file():
        return False
    try:
        with open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
