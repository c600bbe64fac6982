"""A run's folder: what lies where, and that only one process works in it.

config.yaml    the run file that reproduces it         adapter/       the result (PEFT's format), or model/
plan.json      what was expected                       checkpoints/   step-000120/ ...
metrics.jsonl  one line a step                         summary.json   what came out
tensorboard/   the same as TensorBoard events          report.html    what came out, to look at
evaluation.json  the scores, where the run is judged
trackers.json  by what name train.trackers know it
best/          with train.restore_best: the trained weights of the best validation so far
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import IO, Any

from fitune.atomic import write_text
from fitune.errors import InputError


class RunFolder:
    """Paths of a run, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    config_file = property(lambda self: self.path / "config.yaml")
    plan_file = property(lambda self: self.path / "plan.json")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    summary_file = property(lambda self: self.path / "summary.json")
    evaluation_file = property(lambda self: self.path / "evaluation.json")
    report_file = property(lambda self: self.path / "report.html")
    tensorboard = property(lambda self: self.path / "tensorboard")
    adapter = property(lambda self: self.path / "adapter")
    weights = property(lambda self: self.path / "model")
    checkpoints = property(lambda self: self.path / "checkpoints")
    best = property(lambda self: self.path / "best")

    def lock(self) -> None:
        """Makes the folder if need be and keeps other processes out until `unlock` (or the process ends).

        Raises InputError where another process holds it or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until unlock
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", where=self.path) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise InputError("another process is working in this run folder", where=self.path) from None

    def unlock(self) -> None:
        """Lets other processes in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_json(self, path: Path, value: Any) -> None:
        """Writes `value` as readable JSON, atomically."""
        write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def find_adapter(path: Path) -> Path:
    """The adapter folder of a run folder, or `path` itself if it is one. Raises InputError."""
    for folder in (path / "adapter", path):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise InputError("neither a run folder with an adapter nor an adapter", where=path)
