"""What a PEFT LoRA adapter makes of each weight of its base: W + scaling * B @ A, in float32, or DoRA's."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fitune.errors import InputError
from fitune.export.whole_tensors import WholeTensor, place_whole
from fitune.models.source import ModelSource

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"

_PAIR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_((?P<side>[AB])\.weight|magnitude_vector)")
_MAGNITUDE = "magnitude_vector"
_PREFIX = "base_model.model."
# Fields that say how the adapter was made or placed, not what it computes: the tensors carry the outcome.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_dropout", "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_COVERED = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "use_dora",
    "modules_to_save",
}  # fmt: skip
_BASE_CHANGING_STARTS = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class LoraPair:
    """One adapted module: A [R, in], B [out, R] and the factor on their product.

    `is_transposed`: the base's weight is [in, out], as in transformers' `Conv1D`. `magnitude` [out]: of DoRA, the
    length of each output's weights; None for plain LoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    is_transposed: bool
    magnitude: torch.Tensor | None = None

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The base's weight with the adapter in it, float32."""
        made = weight.float() + self.delta()
        if self.magnitude is None:
            return made
        # DoRA (arXiv 2402.09353, eq. 5): the direction of each output's weights is the sum's, their length its own.
        inputs = 0 if self.is_transposed else 1
        lengths = made.norm(dim=inputs, keepdim=True).clamp(min=1e-15)
        return made * (self.magnitude.float().unsqueeze(inputs) / lengths)

    def delta(self) -> torch.Tensor:
        """scaling * B @ A in float32, shaped like the base's weight."""
        product = (self.up.float() @ self.down.float()) * self.scaling
        return product.T if self.is_transposed else product


def read_adapter(
    folder: Path, source: ModelSource, graph: PreTrainedModel, allow_other_base: bool = False
) -> dict[str, LoraPair | WholeTensor]:
    """Adapter folder -> name of a weight in `graph`, the model of `source` -> pair, or what stands in its place.

    Raises InputError, with all problems at once, for an adapter of another base, of a kind that is not LoRA,
    rsLoRA or DoRA, or with a tensor that has no place or another shape.
    """
    config = _read_json(folder / CONFIG)
    problems = _uncovered(config)
    if not allow_other_base:
        problems += _other_base(folder, config, source)
    if problems:
        raise InputError(problems, where=folder)
    tensors = _read_tensors(folder / WEIGHTS)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        matched = _PAIR.fullmatch(key)
        if matched is None and config.get("modules_to_save") and ".lora_" not in key:
            whole[source.graph_module(key.removeprefix(_PREFIX))] = tensor
        elif matched is None:
            problems.append(f"tensor {key} is no part of a LoRA pair on a weight matrix")
        else:
            sides.setdefault(source.graph_module(matched["module"]), {})[matched["side"] or _MAGNITUDE] = tensor
    modules = dict(graph.named_modules())
    placed, odd = place_whole(whole, graph)
    pairs: dict[str, LoraPair | WholeTensor] = {**placed}
    problems += odd
    others = [key for key in tensors if ".lora_" not in key]
    problems += [
        f"{CONFIG}: modules_to_save has {name!r}, and {WEIGHTS} no such tensor"
        for name in config.get("modules_to_save") or () if not any(f"{name}." in key for key in others)
    ]  # fmt: skip
    for module, found in sides.items():
        problem = _check_pair(module, found, config, graph, modules.get(module))
        if problem is None:
            # Not what the configuration says: PEFT goes by the kind of each layer, and writes down the last one's.
            is_transposed = isinstance(modules[module], Conv1D)
            pairs[f"{module}.weight"] = LoraPair(
                found["A"], found["B"], _scaling(module, config), is_transposed, found.get(_MAGNITUDE)
            )
        else:
            problems.append(problem)
    if not pairs and not problems:
        problems.append(f"{WEIGHTS} holds no LoRA tensors")
    if problems:
        more = [f"and {len(problems) - 10} more problems"] if len(problems) > 10 else []
        raise InputError([*problems[:10], *more], where=folder)
    return pairs


def _check_pair(
    module: str, found: dict[str, torch.Tensor], config: dict[str, Any], graph: PreTrainedModel,
    layer: nn.Module | None,
) -> str | None:  # fmt: skip
    if len(found.keys() & {"A", "B"}) != 2:
        return f"{module}: lora_{next(iter(found))} is there without its partner"
    if (_MAGNITUDE in found) != bool(config.get("use_dora")):
        there = "is there" if _MAGNITUDE in found else "is missing"
        return f"{module}: lora_{_MAGNITUDE} {there}, and use_dora is {config.get('use_dora', False)}"
    weight = f"{module}.weight"
    for one, other in graph.all_tied_weights_keys.items():
        if weight in (one, other):
            return f"{module}: {one} is tied to {other}; merging would change both"
    if layer is None or not isinstance(getattr(layer, "weight", None), nn.Parameter):
        return f"{module}: the base has no tensor {weight}"
    down, up = found["A"], found["B"]
    rank = _of_pattern("rank_pattern", module, config, config.get("r"))
    stored = tuple(layer.weight.shape)
    wanted = stored[::-1] if isinstance(layer, Conv1D) else stored
    if not isinstance(layer, (nn.Linear, Conv1D)) or down.ndim != 2 or up.ndim != 2:
        return f"{module}: only LoRA on linear layers is merged, found {type(layer).__name__}"
    if down.shape[0] != rank or up.shape[1] != rank or (up.shape[0], down.shape[1]) != wanted:
        return (
            f"{module}: B {tuple(up.shape)} @ A {tuple(down.shape)} of rank {rank} does not fit a weight of {stored}"
        )
    magnitude = found.get(_MAGNITUDE)
    if magnitude is not None and tuple(magnitude.shape) != wanted[:1]:
        return f"{module}: {len(magnitude)} magnitudes do not fit {wanted[0]} outputs"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        return f"{module}: the adapter holds values that are not finite"
    return None


def _scaling(module: str, config: dict[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
    rank = _of_pattern("rank_pattern", module, config, config.get("r"))
    alpha = _of_pattern("alpha_pattern", module, config, config.get("lora_alpha"))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(field: str, module: str, config: dict[str, Any], default: Any) -> Any:
    """PEFT's rule: a key is a pattern for the end of the module's path, from a dot on; first fit wins."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _uncovered(config: dict[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"{CONFIG}: peft_type is {config.get('peft_type')!r}; LORA is merged")
    if config.get("bias", "none") != "none":
        problems.append(f"{CONFIG}: trained biases (bias: {config['bias']}) are not merged")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING_STARTS):
        problems.append(f"{CONFIG}: init_lora_weights {start!r} changed the base before training; merge with PEFT")
    for field in ("r", "lora_alpha"):
        if (
            not isinstance(config.get(field), int | float)
            or isinstance(config.get(field), bool)
            or config[field] <= 0
        ):
            problems.append(f"{CONFIG}: {field} must be a positive number, found {config.get(field)!r}")
    problems += [
        f"{CONFIG}: {field} is {value!r}, which is not merged here"
        for field, value in config.items()
        if value and field not in _HARMLESS | _COVERED
    ]
    return problems


def _other_base(folder: Path, config: dict[str, Any], source: ModelSource) -> list[str]:
    """Why this adapter belongs to another base; the identity stored beside it decides."""
    way_out = "give the base it was trained on"
    if (folder / BASE).is_file():
        written = _read_json(folder / BASE)
        if written.get("identity") == source.identity():
            return []
        return [
            f"{BASE}: trained on {written.get('reference')!r} with weights {written.get('identity')}, "
            f"but {source.reference!r} has {source.identity()}: another model, or its weights changed; "
            f"{way_out}"
        ]
    name = config.get("base_model_name_or_path")
    if not name or _is_same_model(str(name), source):
        return []
    return [f"{CONFIG}: its base is {name!r}, not {source.reference!r}; {way_out}"]


def _is_same_model(name: str, source: ModelSource) -> bool:
    """By the same words, the same place, or the same last part (a hub name and a folder called after it)."""
    if name == source.reference or Path(name).resolve() == Path(source.reference).resolve():
        return True
    return Path(name).name.lower() == Path(source.reference.partition("@")[0]).name.lower()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing: not a PEFT adapter folder", where=path.parent) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read: {error}", where=path.parent) from error
    if not isinstance(found, dict):
        raise InputError(f"{path.name} is not a JSON object", where=path.parent)
    return found


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        hint = " (adapter_model.bin is pickled and can run code: save the adapter as safetensors)" if pickled else ""
        raise InputError(f"{path.name} is missing{hint}", where=path.parent)
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path.name} is cut short or damaged: {error}", where=path.parent) from error
