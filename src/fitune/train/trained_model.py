"""From the words that name a run, an adapter or a model to what answers questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from fitune.adapters.lora import belongs_to_four_bits, read_base
from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.fuse.model import FusedModel
from fitune.hardware import detect
from fitune.models.find import find_model
from fitune.models.source import ModelSource
from fitune.plan.computation import Computation, choose_computation
from fitune.train.checkpoint import list_checkpoints
from fitune.train.prepare import build_for_answers
from fitune.train.run_folder import RunFolder, find_adapter


@dataclass(frozen=True)
class TrainedModel:
    """A model that can be asked, not built yet.

    Attributes:
        reference: the words that named it.
        source: the base; of a run of method full, the weights it wrote.
        untuned: what the tuned model is compared with; None for a model that nobody tuned here.
        adapter: its folder, if there is one.
        method: as what the base is loaded: "qlora" in 4 bits, else in 16.
        run: the run's folder and settings, if it is a run.
    """

    reference: str
    source: ModelSource
    untuned: ModelSource | None
    adapter: Path | None
    method: str
    computation: Computation
    run: RunFolder | None = None
    config: RunConfig | None = None

    def build(self) -> FusedModel:
        """The model with its adapter."""
        self.computation.begin()
        return build_for_answers(self.source, self.method, self.computation, self.adapter, self._resident_layers)

    def build_untuned(self) -> FusedModel:
        """The base alone (where there is an adapter, switching that off gives the same for less)."""
        self.computation.begin()
        source = self.untuned or self.source
        return build_for_answers(source, self.method, self.computation, resident_layers=self._resident_layers)

    @property
    def _resident_layers(self) -> int | None:
        """As the run was trained."""
        return self.config.train.resident_layers if self.config else None


def find_trained(reference: str, four_bit: bool | None = None) -> TrainedModel:
    """A run folder, an adapter's folder, or whatever names a model -> what to ask. Raises InputError.

    `four_bit`: load the base in NF4, or not (None: as the run trained it, or the adapter needs it; else in 16 bits).
    """
    path = Path(reference).expanduser()
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        return _of_run(reference, RunFolder(path), four_bit)
    method = "qlora" if four_bit else "lora"
    computation = choose_computation(default_config(reference), detect(), for_training=False)
    if (path / "adapter_config.json").is_file():
        base = find_model(_base_of(path))
        if four_bit is None and belongs_to_four_bits(path):
            method = "qlora"
        return TrainedModel(reference, base, base, path, method, computation)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(
            "is no run (config.yaml), no adapter (adapter_config.json) and no model (config.json)",
            where=path,
        )
    return TrainedModel(reference, find_model(reference), None, None, method, computation)


def read_run_config(folder: RunFolder) -> RunConfig:
    """What a run was started with. Its data need not be there any more."""
    try:
        values = yaml.safe_load(folder.config_file.read_text(encoding="utf-8"))
        return RunConfig.model_validate(values)
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise InputError(f"is not the run file of a run: {problem}", where=folder.config_file) from error


def default_config(model: str) -> RunConfig:
    """Every setting at its default, for a model that no run file names."""
    return RunConfig.model_validate({"model": model, "data": {"train": ["none"]}})


def _of_run(reference: str, folder: RunFolder, four_bit: bool | None) -> TrainedModel:
    config = read_run_config(folder)
    method = config.method if four_bit is None else "qlora" if four_bit else "lora"
    computation = choose_computation(config, detect(), for_training=False)
    if (folder.adapter / "adapter_config.json").is_file():
        base = find_model(config.model)
        return TrainedModel(
            reference, base, base, find_adapter(folder.path), method, computation, folder, config
        )  # fmt: skip
    if (folder.weights / "config.json").is_file():
        tuned, base = find_model(str(folder.weights)), find_model(config.model)
        return TrainedModel(reference, tuned, base, None, method, computation, folder, config)
    saved = list_checkpoints(folder.checkpoints)
    how = f"finish it with: fitune train {folder.config_file} --resume" if saved else "it has to be trained anew"
    raise InputError(f"this run came to no result yet; {how}", where=folder.path)


def _base_of(adapter: Path) -> str:
    base = read_base(adapter)
    if base is not None:
        return base["reference"]
    try:
        named = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise InputError(f"adapter_config.json cannot be read: {error}", where=adapter) from error
    if not named:
        raise InputError("adapter_config.json does not say which base it belongs to", where=adapter)
    return str(named)
