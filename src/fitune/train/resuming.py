"""Whether a run may go on: what must be the same, what is not, and from which checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from fitune.config import dump
from fitune.config.schema import RunConfig, TrainSettings
from fitune.data.dataset import TrainingData
from fitune.data.order import ORDER_VERSION
from fitune.errors import InputError
from fitune.models.source import ModelSource
from fitune.plan.computation import Computation
from fitune.train.checkpoint import list_checkpoints, newest_whole, read_identity
from fitune.train.run_folder import RunFolder, find_adapter

# What a resumed run may do otherwise: it changes no bit of what is trained.
_FREE_TO_CHANGE = {
    "save_every_steps": None, "keep_checkpoints": 2, "validate_every_steps": None, "resident_layers": None,
    "optimizer_states": "memory", "trackers": None, "score_every_steps": None,
    "score_samples": TrainSettings.model_fields["score_samples"].default,
}  # fmt: skip


class PreparedRun(Protocol):
    """What a run's identity is made of."""

    @property
    def source(self) -> ModelSource: ...
    @property
    def computation(self) -> Computation: ...
    @property
    def data(self) -> TrainingData: ...


def identity_of(config: RunConfig, prepared: PreparedRun) -> dict[str, str]:
    """What must be the same for a checkpoint to be gone on from."""
    train = config.train.model_copy(update={name: _FREE_TO_CHANGE[name] for name in _free(config)})
    config = config.model_copy(update={"output": None, "memory": None, "train": train})
    computation = prepared.computation
    start = config.lora.start_from
    started = {} if start is None else {"adapter it started from": _file_digest(find_adapter(Path(start)))}
    return {
        **started,
        "config": hashlib.sha256(dump(config).encode()).hexdigest(),
        "data": f"{prepared.data.train.digest()} {prepared.data.validation.digest()}",
        "order of rows": str(ORDER_VERSION),
        "computation": f"{computation.dtype} {computation.backend} {computation.threads} threads"
        + (" int8" if computation.trains_in_int8 else "")
        + (f" in {computation.processes} processes" if computation.processes > 1 else ""),
        "model": prepared.source.identity(),
    }


def _free(config: RunConfig) -> list[str]:
    """What may change without a word; where validations, scores or checkpoints decide the result, they may not."""
    train = config.train
    bound = set()
    if train.early_stopping_patience is not None or train.restore_best:
        bound |= {"validate_every_steps"} if train.best_by == "loss" else {"score_every_steps", "score_samples"}
    if train.on_non_finite == "lower_rate":
        bound.add("save_every_steps")
    return [name for name in _FREE_TO_CHANGE if name not in bound]


def _file_digest(folder: Path) -> str:
    with open(folder / "adapter_model.safetensors", "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_unfinished(folder: RunFolder) -> bool:
    """Whether a run began in the folder and can be gone on with."""
    return bool(list_checkpoints(folder.checkpoints)) and not folder.summary_file.exists()


def refuse_another_run(folder: RunFolder) -> None:
    """Raises InputError where the folder holds a run."""
    if list_checkpoints(folder.checkpoints) or folder.summary_file.exists():
        raise InputError(
            "holds a run already; give another folder, or go on with that run: --resume", where=folder.path
        )


def resume_point(
    folder: RunFolder, identity: Mapping[str, str], config: RunConfig, say: Callable[[str], None], force: bool = False
) -> Path:
    """The newest whole checkpoint.

    Raises InputError where there is none, or the run is another one than it was; with `force` that is only said.
    """
    found, damaged = newest_whole(folder.checkpoints)
    for sentence in damaged:
        say(f"{sentence}; it is not used")
    if found is None:
        raise InputError("there is no checkpoint to go on from", where=folder.path)
    before = read_identity(found)
    changed = [name for name in identity if before.get(name) != identity[name]]
    told = [
        sentence
        for name in changed
        for sentence in (
            _settings_changed(folder, config, say) if name == "config" else [_told(name, before, identity)]
        )
    ]
    if told and not force:
        asked = (
            f"a resumed run must be the run that it was when {found.name} was saved; "
            "--force goes on all the same, to another result"
        )
        raise InputError([*told, asked], where=folder.path)
    for sentence in told:
        say(f"warning: {sentence}; going on all the same, as --force says")
    say(f"going on from {found.name}")
    return found


def _told(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    if name == "data":
        return "the data changed: other samples than before, or the same in another order"
    was = before.get(name)
    return f"the {name} changed: {'it was not noted' if was is None else f'it was {was}'}, and is {now[name]}"


def _settings_changed(folder: RunFolder, config: RunConfig, say: Callable[[str], None]) -> list[str]:
    """Each setting that is not what it was, with both values.

    Settings that the version which began the run did not know had their defaults then; that is said.
    """
    try:
        written = yaml.safe_load(folder.config_file.read_text(encoding="utf-8"))
        before = flat(yaml.safe_load(dump(RunConfig.model_validate(written))))
        now = flat(yaml.safe_load(dump(config)))
        new = [name for name in before if name not in flat(written)]
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return ["the settings changed"]
    free = {"output", "memory", *(f"train.{name}" for name in _free(config))}
    names = [*now, *(name for name in before if name not in now)]
    changed = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in names
        if name not in free and before.get(name) != now.get(name)
    ]
    if new and not changed:
        say(f"the run was begun by a version without {', '.join(new)}, which change nothing as they are")
        return []
    return changed or ["the settings changed"]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
