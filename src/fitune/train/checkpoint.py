"""Checkpoints: everything a run needs to go on, in tensors and JSON, checked by hash before it is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitune.atomic import new_folder
from fitune.errors import FituneError
from fitune.fuse.loss_scale import LossScale
from fitune.fuse.model import FusedModel
from fitune.models.checkpoint_files import SafetensorsFiles
from fitune.models.shards import TensorPlan, write_file
from fitune.step.optimizer import give_back, states_of

TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps taken, and tokens seen and trained so far.

    Attributes:
        non_finite: steps that were left out because their loss or gradients were no finite numbers.
        rate_ratio: what the schedule's learning rate is multiplied by since.
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    non_finite: int = 0
    rate_ratio: float = 1.0


def save_checkpoint(
    folder: Path, model: FusedModel, optimizer: torch.optim.Optimizer, progress: Progress,
    identity: Mapping[str, str], keep: int, randoms: Sequence[Tensor] | None = None,
) -> Path:  # fmt: skip
    """Writes `folder`/step-NNNNNN whole or not at all, then removes all but the newest `keep`.

    `identity` is what a run must share with the checkpoint to go on from it (config, data, model: hashes).
    """
    path = folder / f"step-{progress.step:06d}"
    for left in folder.glob(".step-*"):  # of a process that was killed; the run folder is ours alone
        shutil.rmtree(left)
    tensors = {f"parameter.{index}": parameter for index, parameter in enumerate(model.trainable)}
    scalars: dict[str, Any] = {}
    for index, parameter in enumerate(model.trainable):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    for rank, state_of_rank in enumerate(randoms or [torch.get_rng_state()]):
        tensors[_random_name(rank)] = state_of_rank
    plans = [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with new_folder(path, replace=True) as beside:  # a damaged one of this step may lie there
        for written in write_file(beside / TENSORS, plans, tensors.__getitem__):
            give_back(optimizer, tensors[written.name])
        state = {
            **asdict(progress), "identity": dict(identity), "scalars": scalars,
            "loss_scale": None if model.loss_scale is None else asdict(model.loss_scale),
            "sha256": _digest(beside / TENSORS),
        }  # fmt: skip
        text = json.dumps({**state, "state_sha256": _state_digest(state)}, indent=2)
        (beside / STATE).write_text(text + "\n")
    # Those of later steps are damaged (this run went on from an older one): they do not count as kept.
    for old in [one for one in list_checkpoints(folder) if one.name <= path.name][:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def newest_whole(folder: Path, every: int = 1) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is undamaged (None: there is none), and a sentence for each damaged one.

    `every`: only those after a multiple of so many steps.
    """
    damaged = []
    for path in reversed([one for one in list_checkpoints(folder) if int(one.name[len("step-") :]) % every == 0]):
        try:
            state = json.loads((path / STATE).read_text())
            found = _digest(path / TENSORS)
        except (OSError, ValueError) as error:
            damaged.append(f"checkpoint {path.name} cannot be read: {error}")
            continue
        written = state.pop("state_sha256", None)
        if found == state.get("sha256") and written == _state_digest(state):
            return path, damaged
        damaged.append(f"checkpoint {path.name} is damaged: its contents are not what was written")
    return None, damaged


def read_identity(path: Path) -> dict[str, str]:
    """What the run that wrote this checkpoint was."""
    identity: dict[str, str] = json.loads((path / STATE).read_text())["identity"]
    return identity


def load_checkpoint(path: Path, model: FusedModel, optimizer: torch.optim.Optimizer, rank: int = 0) -> Progress:
    """Puts weights, optimizer and the random state of process `rank` back as they were, one tensor at a time."""
    problems: list[str] = []
    file = SafetensorsFiles([path / TENSORS], problems)
    if problems:
        raise FituneError(f"{path}: {problems[0]}")
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    parameters = model.trainable
    if sum(name.startswith("parameter.") for name in file.names()) != len(parameters):
        raise FituneError(f"{path} holds another number of parameters than this model trains")
    for name in file.names():
        kind, _, rest = name.partition(".")
        place, _, key = rest.partition(".")
        if kind == "parameter":
            _put(file, name, parameters[int(place)].detach())
        elif kind == "optimizer":
            target = states_of(optimizer, parameters[int(place)])[key]
            _put(file, name, target)
            give_back(optimizer, target)
    for name, scalar in state["scalars"].items():
        place, _, key = name.partition(".")
        states_of(optimizer, parameters[int(place)])[key] = scalar
    if state.get("loss_scale") is not None and model.loss_scale is not None:
        model.loss_scale = LossScale(**state["loss_scale"])
    if _random_name(rank) in set(file.names()):  # with --force a run may go on in more processes
        torch.set_rng_state(file.read(_random_name(rank)).clone())
    return Progress(**{one.name: state[one.name] for one in fields(Progress) if one.name in state})


def _random_name(rank: int) -> str:
    return f"random.{rank}" if rank else "random"


def _put(file: SafetensorsFiles, name: str, target: Tensor) -> None:
    if file.shape(name) != tuple(target.shape) or file.dtype(name) != target.dtype:
        raise FituneError(
            f"checkpoint tensor {name} is {file.shape(name)} {file.dtype(name)}, this run's is "
            f"{tuple(target.shape)} {target.dtype}"
        )
    target.copy_(file.read(name))
    file.release()


def _state_digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
