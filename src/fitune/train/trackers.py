"""A run's records for Weights & Biases, MLflow, Trackio and SwanLab, where they are installed and asked for.

Each keeps its own account of the run; what a run must have lies in its folder all the same. So a tracker that fails
is told of once and left, and the run goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from fitune.errors import InputError
from fitune.train.loop import Record
from fitune.train.run_folder import RunFolder
from fitune.train.scalars import scalars_of

PROJECT = "fitune"
# MLflow waits minutes for a server that does not answer (7 retries of up to 120 s) unless told, and steps with it.
_SHORT_WAITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
# Names that are no fields (a pattern's keys are expressions, which MLflow's names cannot be).
_OPEN_SECTIONS = ("lora.rank_pattern", "lora.alpha_pattern")
# MLflow takes so much of a parameter's value, and so many parameters at a time.
_LONGEST_VALUE, _MOST_PARAMETERS = 6000, 100


class Tracker(Protocol):
    """One service's account of a run."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Numbers of a step, by name."""

    def close(self, is_whole: bool) -> None:
        """The run is over; `is_whole`: it came to its end."""


class _Wandb:
    def __init__(self, name: str, key: str, config: Mapping[str, Any], folder: RunFolder) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT, name=name, id=key, config=dict(config), dir=str(folder.path), resume="allow"
        )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, is_whole: bool) -> None:
        self._run.finish(exit_code=0 if is_whole else 1)


class _Mlflow:
    def __init__(self, name: str, key: str, config: Mapping[str, Any], folder: RunFolder) -> None:
        for setting, value in _SHORT_WAITS.items():
            os.environ.setdefault(setting, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = self._client.create_experiment(PROJECT) if found is None else found.experiment_id
        runs = self._client.search_runs([experiment], f"tags.fitune_run = '{key}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={"fitune_run": key}, run_name=name).info.run_id
        parameters = [Param(field, str(value)[:_LONGEST_VALUE]) for field, value in _flat(config)]
        try:
            for start in range(0, len(parameters), _MOST_PARAMETERS):
                self._client.log_batch(self._id, params=parameters[start : start + _MOST_PARAMETERS])
        except Exception:
            self.close(is_whole=False)  # or it would be running for ever there
            raise

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self, is_whole: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_whole else "KILLED")


class _Trackio:
    def __init__(self, name: str, key: str, config: Mapping[str, Any], folder: RunFolder) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=f"{name}-{key}", config=dict(config), resume="allow", embed=False)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(scalars), step=step)

    def close(self, is_whole: bool) -> None:
        self._trackio.finish()


class _Swanlab:
    def __init__(self, name: str, key: str, config: Mapping[str, Any], folder: RunFolder) -> None:
        import swanlab

        self._swanlab = swanlab
        swanlab.init(
            project=PROJECT, experiment_name=name, config=dict(config), logdir=str(folder.path / "swanlab"), id=key,
            resume="allow",
        )  # fmt: skip

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(scalars), step=step)

    def close(self, is_whole: bool) -> None:
        self._swanlab.finish(state="success" if is_whole else "aborted")


_KINDS: Mapping[str, Callable[[str, str, Mapping[str, Any], RunFolder], Tracker]] = {
    "wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio, "swanlab": _Swanlab,
}  # fmt: skip


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError for those that are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not installed; pip install {' '.join(missing)}", where="train.trackers"
        )


class Trackers:
    """All of a run's; usable as `watch=`.

    Args:
        names: of `train.trackers`.
        config: the run's, as it stands in its folder.
        say: is told, once each, of those that fail.
        is_new: whether the run begins; what an earlier one in the folder left is another run to them then.
    """

    def __init__(
        self, names: Sequence[str], folder: RunFolder, config: Mapping[str, Any], say: Callable[[str], None],
        is_new: bool = False,
    ) -> None:  # fmt: skip
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, partial(self._begin, name, folder, config, is_new))
            is_new = False  # all have the same

    def __call__(self, record: Record) -> None:
        scalars = scalars_of(record)
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, scalars, record.step))

    def close(self, is_whole: bool) -> None:
        """Ends all of them."""
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.close, is_whole))
        self._open.clear()

    def _begin(self, name: str, folder: RunFolder, config: Mapping[str, Any], is_new: bool) -> None:
        key = _key(folder, is_new)
        self._open[name] = _KINDS[name](folder.path.resolve().name, key, config, folder)

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except (Exception, SystemExit) as error:  # whatever a service's client raises: the run is worth more
            self._open.pop(name, None)
            self._say(f"warning: {name} is told nothing more of this run: {type(error).__name__}: {error}")


def _key(folder: RunFolder, is_new: bool) -> str:
    """By which a run that is gone on with is the same to the trackers; another one where the note is damaged."""
    path = folder.path / "trackers.json"
    if path.is_file() and not is_new:
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    key = uuid.uuid4().hex[:12]
    folder.write_json(path, {"id": key})
    return key


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Of sections in sections `train.epochs` and its value."""
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name in _OPEN_SECTIONS:
            yield prefix + name, json.dumps(value)
        elif isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
