"""Checkpoints: everything a run needs to go on, in tensors and JSON, checked by hash before it is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fitune.atomic import new_folder
from fitune.errors import FituneError
from fitune.fuse.model import FusedModel

TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps taken, and tokens seen and trained so far."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path, model: FusedModel, optimizer: torch.optim.Optimizer, progress: Progress,
    identity: Mapping[str, str], keep: int,
) -> Path:  # fmt: skip
    """Writes `folder`/step-NNNNNN whole or not at all, then removes all but the newest `keep`.

    `identity` is what a run must share with the checkpoint to go on from it (config, data, model: hashes).
    """
    path = folder / f"step-{progress.step:06d}"
    for left in folder.glob(".step-*"):  # of a process that was killed; the run folder is ours alone
        shutil.rmtree(left)
    tensors = {f"parameter.{i}": p.detach().contiguous() for i, p in enumerate(model.trainable)}
    scalars: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in _flat(state):
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.contiguous()
            else:
                scalars[f"{index}.{name}"] = value
    tensors["random"] = torch.get_rng_state()
    with new_folder(path, replace=True) as beside:  # a damaged one of this step may lie there
        save_file(_apart(tensors), beside / TENSORS)
        state = {
            "step": progress.step, "tokens": progress.tokens, "trained_tokens": progress.trained_tokens,
            "seconds": progress.seconds, "identity": dict(identity), "scalars": scalars,
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


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is undamaged (None: there is none), and a sentence for each damaged one."""
    damaged = []
    for path in reversed(list_checkpoints(folder)):
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


def load_checkpoint(path: Path, model: FusedModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts weights, optimizer and random state back as they were."""
    tensors = load_file(path / TENSORS)
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    parameters = model.trainable
    if sum(name.startswith("parameter.") for name in tensors) != len(parameters):
        raise FituneError(f"{path} holds another number of parameters than this model trains")
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"parameter.{index}"])
    states: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, place, key = name.split(".", 2)
            _put(states.setdefault(int(place), {}), key, value)
    for name, scalar in state["scalars"].items():
        place, key = name.split(".", 1)
        _put(states.setdefault(int(place), {}), key, scalar)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random"])
    return Progress(state["step"], state["tokens"], state["trained_tokens"], state["seconds"])


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a parameter's state; bitsandbytes' optimizers keep part of it in an inner dictionary."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", inner_value) for inner, inner_value in value.items())
        else:
            yield name, value


def _put(state: dict[str, Any], name: str, value: Any) -> None:
    """The inverse, for one value."""
    outer, slash, inner = name.rpartition("/")
    if slash:
        state.setdefault(outer, {})[inner] = value
    else:
        state[name] = value


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a copy of every tensor whose memory another one has (8-bit optimizers share their tables)."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        result[name] = value.clone() if place in seen else value
        seen.add(place)
    return result


def _state_digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
