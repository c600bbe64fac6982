"""The trained weights of the best validation, or score, so far, kept beside the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fitune.atomic import new_folder
from fitune.errors import FituneError
from fitune.fuse.model import FusedModel
from fitune.models.checkpoint_files import SafetensorsFiles
from fitune.models.shards import TensorPlan, write_file

_TENSORS, _FACTS = "tensors.safetensors", "validation.json"


def save_best(folder: Path, model: FusedModel, step: int, value: float, name: str = "validation_loss") -> None:
    """Writes them in place of those before, with the best value and its name.

    Raises DiskFullError with the old ones untouched.
    """
    tensors = {f"parameter.{index}": parameter for index, parameter in enumerate(model.trainable)}
    plans = [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with new_folder(folder, replace=True) as beside:
        for _ in write_file(beside / _TENSORS, plans, tensors.__getitem__):
            pass
        (beside / _FACTS).write_text(json.dumps({"step": step, name: value}) + "\n")


def best_step(folder: Path) -> int | None:
    """After which step they were taken; None: there are none."""
    facts = folder / _FACTS
    return int(json.loads(facts.read_text())["step"]) if facts.is_file() else None


@torch.no_grad()
def take_best(folder: Path, model: FusedModel) -> None:
    """Puts them into the model."""
    problems: list[str] = []
    file = SafetensorsFiles([folder / _TENSORS], problems)
    if problems:
        raise FituneError(f"{folder}: {problems[0]}")
    for index, parameter in enumerate(model.trainable):
        parameter.copy_(file.read(f"parameter.{index}"))
        file.release()
