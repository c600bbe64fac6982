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
from fitune.adapters.whole_modules import are_tied, end_names, whole_names
from fitune.errors import InputError

# What PEFT's LoRA can do beside a matrix pair on each module, by the value that means: not here.
_BESIDE = {
    "bias": "none",
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
    modules_to_save: tuple[str, ...] | None


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
    others = [key for key in keys if ".lora_" not in key] if config.get("modules_to_save") else []
    whole = {key.removeprefix(_PREFIX).rpartition(".")[0] for key in others}
    whole = {inner(name) for name in whole} if inner is not None else whole
    return AdapterSettings(
        int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora")),
        _targets(names, graph, head, whole, folder), dict(config.get("rank_pattern") or {}),
        dict(config.get("alpha_pattern") or {}), bool(config.get("use_dora")),
        _modules_to_save(whole, graph, bool(config.get("ensure_weight_tying")), folder),
    )  # fmt: skip


def _targets(
    names: set[str], graph: PreTrainedModel, head: str, whole: set[str], folder: Path
) -> str | tuple[str, ...]:  # fmt: skip
    """How the run file names just these layers."""
    if names == set(target_names(graph, head, "all-linear")) - whole:
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


def _modules_to_save(
    names: set[str], graph: PreTrainedModel, is_tied: bool, folder: Path
) -> tuple[str, ...] | None:  # fmt: skip
    """How the run file names the modules that the adapter has whole."""
    if not names:
        return None
    if are_tied(graph) and not is_tied and names & set(end_names(graph)):
        ends = " and ".join(sorted(names & set(end_names(graph))))
        raise InputError(
            f"this adapter has {ends} whole, apart from what it is tied to in the model (ensure_weight_tying is not "
            "true); a run trains both as one, and cannot go on with it",
            where=folder,
        )
    short = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    for asked in (short, tuple(sorted(names))):
        if set(whole_names(graph, asked, where=str(folder))) == names:
            return asked
    raise InputError(f"this adapter has {', '.join(sorted(names))} whole, which this model has not so", where=folder)
