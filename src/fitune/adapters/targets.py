"""Which layers get an adapter. We list them ourselves: PEFT's `all-linear` skips in silence what it does not know."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fitune.errors import InputError
from fitune.models.graph import is_plain_linear, router_names


class TargetSettings(Protocol):
    """The run file's `lora` section, as far as it says which layers are adapted with which rank."""

    @property
    def targets(self) -> str | Sequence[str]: ...
    @property
    def rank(self) -> int: ...
    @property
    def rank_pattern(self) -> Mapping[str, int]: ...
    @property
    def alpha_pattern(self) -> Mapping[str, float]: ...


def target_ranks(model: PreTrainedModel, head: str, settings: TargetSettings) -> dict[str, int]:
    """The layers to adapt as `target_names` has them, with the rank of each.

    Raises InputError as that, and for patterns that no such layer fits.
    """
    names = target_names(model, head, settings.targets)
    kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
    problems = []
    for field, pattern in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        for key in pattern:
            try:
                fits = any(get_pattern_key([key], name) == key for name in names)
            except re.error as error:
                problems.append(f"lora.{field}: {key!r} is no pattern: {error}")
                continue
            if not fits:
                problems.append(f"lora.{field}: {key!r} fits none of the adapted layers (there are: {kinds})")
        if not problems:
            problems += _ambiguous(field, pattern, names)
    if problems:
        raise InputError(problems)
    pattern = settings.rank_pattern
    return {name: pattern.get(get_pattern_key(list(pattern), name), settings.rank) for name in names}


def _ambiguous(field: str, pattern: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """A sentence where a layer fits two keys of different values: which of them counts is an accident.

    PEFT takes the first one that fits, and saves them in another order than they were given in.
    """
    for name in names:
        fitting = [key for key in pattern if get_pattern_key([key], name) == key]
        if len({pattern[key] for key in fitting}) > 1:
            both = " and ".join(repr(key) for key in fitting)
            return [f"lora.{field}: {name} fits {both}, with different values; write them so that it fits one"]
    return []


def refused_by_peft(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """Layers among `names` that PEFT cannot adapt in this model, and why.

    PEFT takes the last part of some names for experts of older checkpoints, and so would adapt, and load, something
    else; and it forbids a layer that state-space models go around. An adapter on these could not be loaded by it.
    """
    config = LoraConfig(r=1, target_modules=list(names))
    convert_peft_config_for_transformers(config, model, None)
    kept = set(config.target_modules or ())
    refused = dict.fromkeys((name for name in names if name not in kept), "PEFT takes its name for one of experts")
    for name in kept:
        try:
            _check_lora_target_modules_mamba(config, model, name.rsplit(".", 1)[-1])
        except ValueError:
            refused[name] = "PEFT does not adapt it in state-space models"
    return refused


def left_without_adapter(model: PreTrainedModel, head: str) -> dict[str, str]:
    """Kinds of linear layers that "all-linear" leaves out although they are neither head nor router, and why."""
    left = {head, *router_names(model)}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in left and not is_plain_linear(module):
            found[name] = f"{type(module).__name__} computes something else than a linear layer"
    wanted = [name for name, module in model.named_modules() if is_plain_linear(module) and name not in left]
    found.update(refused_by_peft(model, wanted))
    return {re.sub(r"\.\d+\.", ".*.", name): reason for name, reason in found.items()}


def target_names(model: PreTrainedModel, head: str, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers to adapt.

    Args:
        head: name of the output head, never part of "all-linear".
        targets: "all-linear" (all but the head, the routers of mixtures and `refused_by_peft`), of these "attention"
            or "mlp" (the others), or names as in the model ("q_proj", or longer ends of a full name).

    Raises:
        InputError: for names that match no linear layer, with the names there are.
    """
    linears = [n for n, module in model.named_modules() if is_plain_linear(module) or isinstance(module, Conv1D)]
    if targets in ("attention", "mlp"):
        found = target_names(model, head, "all-linear")
        chosen_ones = [name for name in found if _is_in_attention(model, name) == (targets == "attention")]
        if not chosen_ones:
            raise InputError(f"this model has no linear layers of {targets}", where="lora.targets")
        return chosen_ones
    if targets == "all-linear":
        left = {head, *router_names(model)}
        wanted = [name for name in linears if name not in left]
        refused = refused_by_peft(model, wanted)
        return [name for name in wanted if name not in refused]
    chosen: dict[str, None] = {}
    problems = []
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    for target in [targets] if isinstance(targets, str) else targets:
        found = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not found:
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{target!r} matches no linear layer{hint} (there are: {', '.join(known)})")
        chosen.update(dict.fromkeys(found))
    problems += [f"{name}: {reason}" for name, reason in refused_by_peft(model, list(chosen)).items()]
    if problems:
        raise InputError(problems, where="lora.targets")
    return list(chosen)


def _is_in_attention(model: PreTrainedModel, name: str) -> bool:
    """Whether a layer is a part of a module of attention, by the classes of the modules that it is in."""
    parts = name.split(".")[:-1]
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any("attention" in type(model.get_submodule(one)).__name__.lower() for one in around)
