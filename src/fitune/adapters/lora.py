"""Injecting a LoRA adapter, and saving and loading it in PEFT's format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fitune.adapters.outer_names import Rename, renamed_key, renamed_targets, under_graph_names
from fitune.adapters.targets import target_names
from fitune.adapters.whole_modules import (
    check_not_quantised,
    learn_on,
    train_whole,
    whole_names,
    whole_parameters,
    without_whole,
)
from fitune.atomic import new_folder
from fitune.errors import InputError
from fitune.quant.parameter import QuantisedParameter

BASE_FILE = "base.json"
# What base.json says under "weights" where it is not the base as it is that an adapter belongs to.
FOUR_BITS = "nf4"
ADAPTER = "default"
# Ways to begin that change nothing but A and B.
_ONLY_FILLING = (False, "gaussian", "orthogonal")
# Makes a LoRA layer for a base layer, or None to leave it to PEFT's own classes.
LayerFactory = Callable[..., nn.Module | None]


def inject(
    model: PreTrainedModel, head: str, *, rank: int, alpha: float, dropout: float, targets: Any, rslora: bool,
    seed: int, base_name: str, layer: LayerFactory | None = None, rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None, dora: bool = False, whole: Sequence[str] | None = None,
    with_values: bool = True,
) -> PeftModel:  # fmt: skip
    """`model` with a fresh adapter (A random from `seed`, B zero) on every target; the base is frozen.

    `layer` makes the LoRA layers (the fused ones); where it returns None PEFT's own are used. The patterns are as
    PEFT's: ends of names, or expressions, with the rank and alpha of the layers that they fit. `dora`: each layer has
    a magnitude for every output too, which begins as the length of the weight's row. `whole`: modules that are
    trained themselves (`whole_names`); `with_values=False` leaves the memory of their copies untouched.
    Raises InputError for targets that match nothing, or that DoRA is not for, and for what cannot be trained whole.
    """
    saved = whole_names(model, whole)
    names = list(without_whole(dict.fromkeys(target_names(model, head, targets)), saved, targets))
    transposed = [name for name in names if dora and isinstance(model.get_submodule(name), Conv1D)]
    if transposed:
        raise InputError(
            f"{len(transposed)} of the adapted layers, such as {transposed[0]}, keep their weights transposed "
            "(Conv1D); DoRA is for ordinary linear layers: leave it out, or name other lora.targets",
            where="lora.dora",
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, target_modules=names, bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path=base_name, rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}), use_dora=dora,
    )  # fmt: skip
    if layer is not None:
        config._register_custom_module({nn.Linear: layer})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    found = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    if len(found) != len(names):
        raise RuntimeError(f"PEFT adapted {len(found)} of {len(names)} layers")
    train_whole(adapted, saved, ADAPTER, with_values)
    return adapted


def save_adapter(model: PeftModel, folder: Path, base: dict[str, str], outer: Rename | None = None) -> None:
    """Writes the adapter as PEFT does (adapter_model.safetensors, adapter_config.json) plus `base.json`.

    `base` says what the adapter belongs to (`reference`, `identity`, and `weights` where it is made for other
    numbers than the base's own); `outer` gives modules the names that they
    have in the model that others load (`ModelSource.outer_module`). The folder appears whole or not at all.
    """
    state = {
        name: value.detach().to(torch.float32).contiguous().clone()
        for name, value in get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False).items()
    }
    config = model.peft_config[ADAPTER].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config["inference_mode"] = True
    if outer is not None:
        state = {renamed_key(name, outer): value for name, value in state.items()}
        config = renamed_targets(config, outer)
    text = json.dumps(config, indent=2, sort_keys=True, default=lambda value: getattr(value, "value", str(value)))
    with new_folder(folder, replace=True) as beside:
        save_file(state, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        (beside / "adapter_config.json").write_text(text + "\n")
        (beside / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n")


def read_base(folder: Path) -> dict[str, str] | None:
    """What `save_adapter` wrote about the base; None for an adapter that another program made."""
    path = folder / BASE_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def belongs_to_four_bits(folder: Path) -> bool:
    """Whether an adapter makes up for what its base loses to 4 bits, and is wrong beside the 16-bit one."""
    return (read_base(folder) or {}).get("weights") == FOUR_BITS


def load_adapter(
    model: PreTrainedModel,
    folder: Path,
    identity: str,
    layer: LayerFactory | None = None,
    trainable: bool = False,
    inner: Rename | None = None,
    dropout: float | None = None,
) -> PeftModel:
    """`model` with the adapter that lies in `folder`, ours or another program's.

    `identity`: of the model's source (`ModelSource.identity`). `dropout`: in place of the adapter's own.
    `inner` gives modules back the names that they have in `model` (`ModelSource.graph_module`).
    Raises InputError where there is no adapter, it is damaged, fits another model, or belongs to another base, or to
    its 4 bits where it is not in them.
    """
    config_path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    missing = [path.name for path in (config_path, weights) if not path.is_file()]
    if missing:
        raise InputError(f"no adapter here: {' and '.join(missing)} missing", where=folder)
    base = read_base(folder)
    if base is not None and base.get("identity", identity) != identity:
        raise InputError(
            f"this adapter was trained on {base['reference']!r} (weights {base['identity']}), not on the model given "
            f"(weights {identity}); give the same model, from wherever",
            where=folder,
        )
    if belongs_to_four_bits(folder) and not any(isinstance(one, QuantisedParameter) for one in model.modules()):
        raise InputError(
            "this adapter makes up for the 4 bits of its base (lora.initial loftq): beside 16-bit weights it would "
            "change them by what they never lost. Load the base in 4 bits (method qlora, --four-bit), or merge it "
            "first (fitune merge)",
            where=folder,
        )
    with under_graph_names(folder, inner) as place:
        return _load(model, place, folder, layer, trainable, dropout)


def _load(
    model: PreTrainedModel, place: Path, folder: Path, layer: LayerFactory | None, trainable: bool,
    dropout: float | None,
) -> PeftModel:  # fmt: skip
    """The adapter as it lies in `place`; problems are told of `folder`."""
    try:
        config = LoraConfig.from_pretrained(str(place))
    except (ValueError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"adapter_config.json is not a LoRA adapter that PEFT reads: {error}", where=folder
        ) from error
    if dropout is not None:
        config.lora_dropout = dropout
    if config.init_lora_weights in _ONLY_FILLING:
        config.init_lora_weights = True  # what A and B began with is overwritten
    check_not_quantised(model, config.modules_to_save or (), folder)
    if layer is not None:
        config._register_custom_module({nn.Linear: layer})
    try:
        from safetensors import safe_open

        with safe_open(place / "adapter_model.safetensors", framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
        adapted = PeftModel.from_pretrained(
            model, str(place), adapter_name=ADAPTER, config=config, is_trainable=trainable
        )
    except Exception as error:
        raise InputError(f"the adapter does not fit this model: {error}", where=folder) from error
    have = set(get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False))
    if tensors.keys() != have:
        odd = sorted(tensors.keys() ^ have)
        raise InputError(
            f"{len(odd)} tensors of the adapter and the model do not match, such as {odd[0]}", where=folder
        )
    if trainable:
        learn_on(adapted, ADAPTER)
    # PEFT renames tensors as older checkpoints want it, and loses some whose names only look like theirs.
    parameters = dict(adapted.named_parameters())
    whole = whole_parameters(adapted, ADAPTER)
    with torch.no_grad():
        for key, tensor in tensors.items():
            name, _, leaf = key.rpartition(".")
            is_magnitude = leaf == "lora_magnitude_vector"  # the only one whose name in a file has no "weight"
            inside = f"{key}.{ADAPTER}.weight" if is_magnitude else f"{name}.{ADAPTER}.{leaf}"
            target = whole.get(key, parameters.get(inside))
            if target is not None:
                target.copy_(tensor)
    return adapted


def adapter_digest(model: PeftModel) -> str:
    """A hash over the adapter's exact bits, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(
        get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False).items()
    ):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
