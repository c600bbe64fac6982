"""The transformers graph of a model without its weights, and which of its matrices are quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fitune.errors import FituneError, InputError

# A model of which less than this share of the weights outside its embeddings is quantised gains too little
# from a 4-bit store; it is refused rather than quantised in name only.
LEAST_QUANTISED_SHARE = 0.9


def build_graph(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with parameters of `dtype` on the meta device and every buffer computed on the CPU.

    Raises InputError for a configuration that transformers has no causal language model for.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise InputError(f"transformers has no causal language model for {config.model_type!r}: {error}") from error
    _compute_buffers(model)
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """Gives every meta buffer (rotary frequencies, masks) its value, through the model's own initialisation."""
    waiting: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            fresh = torch.empty(buffer.shape, dtype=buffer.dtype)
            module._buffers[name] = fresh.fill_(float("nan")) if buffer.is_floating_point() else fresh.zero_()
            if name not in module._non_persistent_buffers_set:
                continue  # the checkpoint carries it
            waiting.append((module, name))
    for module in {id(module): module for module, _ in waiting}.values():
        model._init_weights(module)  # its parameters, on the meta device, stay without values
    for module, name in waiting:
        value = module._buffers[name]
        assert value is not None
        if value.is_floating_point() and not is_fake(value) and bool(value.isnan().any()):
            raise FituneError(f"{type(module).__name__}.{name} is not computed by transformers' initialisation")


def head_name(model: PreTrainedModel) -> str:
    """The name of the output head's module."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            return name
    raise FituneError(f"{type(model).__name__} has no output head")


def quantised_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules whose weight is quantised: every linear layer but the output head.

    Raises InputError where that leaves more than a tenth of the non-embedding weights in 16 bits.
    """
    head = head_name(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != head]
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_submodule(head).weight)}
    total = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    share = sum(model.get_submodule(name).weight.numel() for name in names) / max(total, 1)
    if share < LEAST_QUANTISED_SHARE:
        raise InputError(
            f"only {share:.0%} of the weights of {type(model).__name__} are in linear layers, which is what is "
            "quantised; use method: lora or full for this model"
        )
    return names


def set_parameter(model: nn.Module, name: str, value: torch.Tensor, trainable: bool = False) -> None:
    """Puts `value` in place of the parameter or buffer `name`; shapes must agree (ValueError)."""
    module_name, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    old = getattr(module, leaf)
    if tuple(old.shape) != tuple(value.shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, the configuration wants {tuple(old.shape)}")
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=trainable)
    else:
        module._buffers[leaf] = value
