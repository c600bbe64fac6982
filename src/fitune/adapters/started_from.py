"""An adapter to go on from, ours or another program's: the settings that make a model ready for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from fitune.adapters.outer_names import Rename
from fitune.adapters.targets import target_names
from fitune.errors import InputError

# What PEFT's LoRA can do beside a matrix pair on each module, by the value that means: not here.
_BESIDE = {
    "modules_to_save": None, "bias": "none",
    "fan_in_fan_out": False, "layers_to_transform": None, "layer_replication": None, "trainable_token_indices": None,
    "target_parameters": None, "lora_bias": False, "use_qalora": False, "corda_config": None, "arrow_config": None,
}  # fmt: skip
_PREFIX, _MARK = "base_model.model.", ".lora_A."


@dataclass(frozen=True)
class AdapterSettings:
    """What a run's `lora` section must say to have the same adapter."""

    rank: int
    alpha: float
    rslora: bool
    targets: str | tuple[str, ...]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    dora: bool


def settings_of(folder: Path, graph: PreTrainedModel, head: str, inner: Rename | None = None) -> AdapterSettings:
    """Of the adapter in `folder`, on the model `graph` (its weights are not looked at).

    `inner` gives modules back the names that they have in `graph`. Raises InputError where it is no LoRA adapter, is
    of a kind that a run cannot go on with, or has layers that the model has not.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as handle:
            keys = list(handle.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"this adapter cannot be read: {error}", where=folder) from error
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise InputError(f"this is an adapter of the kind {kind}; a run goes on with LORA", where=folder)
    odd = [name for name, plain in _BESIDE.items() if config.get(name) not in (plain, None, False)]
    if odd:
        used = ", ".join(f"{name} {config[name]!r}" for name in odd)
        raise InputError(f"this adapter uses {used}, which a run cannot go on with", where=folder)
    names = {key.removeprefix(_PREFIX).partition(_MARK)[0] for key in keys if _MARK in key}
    names = {inner(name) for name in names} if inner is not None else names
    return AdapterSettings(
        int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora")),
        _targets(names, graph, head, folder), dict(config.get("rank_pattern") or {}),
        dict(config.get("alpha_pattern") or {}), bool(config.get("use_dora")),
    )  # fmt: skip


def _targets(names: set[str], graph: PreTrainedModel, head: str, folder: Path) -> str | tuple[str, ...]:
    """How the run file names just these layers."""
    if names == set(target_names(graph, head, "all-linear")):
        return "all-linear"
    ends = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    found: set[Any] = set()
    if ends:
        try:
            found = set(target_names(graph, head, ends))
        except InputError as error:
            raise InputError(error.problems, where=folder) from None
    if found != names:
        missing = sorted(found - names) or sorted(names - found) or ["any layer"]
        raise InputError(
            f"this adapter is on some layers of the names {', '.join(ends)}, and not on others, such as "
            f"{missing[0]}; a run goes on with one that is on all of them",
            where=folder,
        )
    return ends
