"""The transformers graph of a model without its weights, and which of its matrices are quantised."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.conv import _ConvNd
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights

from fitune.errors import FituneError, InputError
from fitune.kernels.reference import BLOCK
from fitune.quant.linear import QuantisedLinear
from fitune.quant.nf4 import NF4Weight
from fitune.quant.parameter import QuantisedParameter, replace_parameter

# A model of which less than this share of the weights outside its embeddings is quantised gains too little
# from a 4-bit store; it is refused rather than quantised in name only.
LEAST_QUANTISED_SHARE = 0.9
# Below this a stack of matrices is something else: kernels of a convolution, tables of a scan.
LEAST_EXPERT_SIDE = 16


def build_graph(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with parameters of `dtype` on the meta device and every buffer computed on the CPU.

    `config` stays as it is: the model has a copy, into which transformers writes `dtype` and what else is chosen.
    Raises InputError for a configuration that transformers has no causal language model for.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
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
    owners = _initialisers(model)
    for module in {id(module): module for module, _ in waiting}.values():
        owners[module]._init_weights(module)  # its parameters, on the meta device, stay without values
    left = [(module, name) for module, name in waiting if _has_no_value(module._buffers[name])]
    if left:
        _compute_at_construction(model, left)


def _initialisers(model: PreTrainedModel) -> dict[nn.Module, PreTrainedModel]:
    """Every module's innermost enclosing transformers model: that one knows how to initialise it."""
    owners: dict[nn.Module, PreTrainedModel] = {}
    for module in model.modules():  # outer ones first
        if isinstance(module, PreTrainedModel):
            owners.update(dict.fromkeys(module.modules(), module))
    return owners


def _has_no_value(buffer: torch.Tensor | None) -> bool:
    return buffer is not None and buffer.is_floating_point() and not is_fake(buffer) and bool(buffer.isnan().any())


def _compute_at_construction(model: PreTrainedModel, left: list[tuple[nn.Module, str]]) -> None:
    """Buffers that only a module's construction computes: from the model built again, its parameters on meta."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        again = type(model)(model.config)
    names = {module: name for name, module in model.named_modules()}
    for module, name in left:
        value = again.get_submodule(names[module])._buffers[name]
        if value is None or value.is_meta or _has_no_value(value):
            raise FituneError(f"{names[module]}.{name} is computed neither by construction nor by initialisation")
        module._buffers[name] = value


def head_name(model: PreTrainedModel) -> str:
    """The name of the output head's module."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            return name
    raise FituneError(f"{type(model).__name__} has no output head")


def is_plain_linear(module: nn.Module) -> bool:
    """A linear layer that computes what `nn.Linear` does; a subclass's own forward is tried on a small weight."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward in (nn.Linear.forward, QuantisedLinear.forward):
        return True
    twin = copy.copy(module)
    weight, x = torch.arange(12.0).view(3, 4) / 7 - 1, torch.arange(8.0).view(2, 4) / 5 - 1
    twin._parameters = {"weight": nn.Parameter(weight), "bias": None}
    try:
        found = twin(x)
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return False
    return isinstance(found, torch.Tensor) and torch.equal(found, nn.functional.linear(x, weight))


def expert_counts(config: PretrainedConfig) -> frozenset[int]:
    """How many experts the model's mixtures have, by every field of the configuration that says so."""
    fields = config.get_text_config().to_dict()
    nested = [value for value in fields.values() if isinstance(value, dict)]
    return frozenset(
        value for level in (fields, *nested) for name, value in level.items()
        if str(name).endswith("experts") and type(value) is int and value > 1
    )  # fmt: skip


def router_names(model: PreTrainedModel) -> frozenset[str]:
    """Names of the linear layers that score experts: small, and ruinous to disturb."""
    counts = expert_counts(model.config)
    return frozenset(
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features in counts
    )  # fmt: skip


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of the decoder: all but the output head and the routers."""
    left = {head_name(model), *router_names(model)}
    return [name for name, module in model.named_modules() if is_plain_linear(module) and name not in left]


def quantised_names(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that a 4-bit store quantises.

    The weights of `linear_names`, and parameters that modules multiply by themselves: three-dimensional ones
    (stacked experts), and two-dimensional ones at least a block wide each way that score no experts.
    """
    linears = [f"{name}.weight" for name in linear_names(model)]
    counts = expert_counts(model.config)
    spared = (nn.Linear, nn.Embedding, _ConvNd, nn.LayerNorm)
    bare = [
        f"{owner}.{name}" if owner else name
        for owner, module in model.named_modules() if not isinstance(module, spared)
        for name, parameter in module.named_parameters(recurse=False)
        if _is_matrix(parameter, counts)
    ]  # fmt: skip
    spared_too = _embeddings(model)
    tied = model.all_tied_weights_keys
    return [
        name for name in (*linears, *bare)
        if id(model.get_parameter(name)) not in spared_too and name not in tied
    ]  # fmt: skip


def _embeddings(model: PreTrainedModel) -> set[int]:
    """The parameters of embeddings and the output head, by identity."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(p) for module in (*modules, model.get_submodule(head_name(model))) for p in module.parameters()}


def quantised_share(model: PreTrainedModel, names: Iterable[str]) -> float:
    """The share of `names` in the model's weights without its embeddings and head."""
    embeddings = _embeddings(model)
    tied = model.all_tied_weights_keys
    total = sum(p.numel() for n, p in model.named_parameters() if id(p) not in embeddings and n not in tied)
    return sum(model.get_parameter(name).numel() for name in names) / max(total, 1)


def check_quantised_share(
    model: PreTrainedModel, names: Iterable[str], least_share: float = LEAST_QUANTISED_SHARE
) -> None:
    """Raises InputError where less than `least_share` of the non-embedding weights would be quantised."""
    share = quantised_share(model, names)
    if share < least_share:
        raise InputError(
            f"only {share:.0%} of the weights of {type(model).__name__} are matrices that can be quantised; "
            "use method: lora or full for this model"
        )


def _is_matrix(parameter: nn.Parameter, counts: frozenset[int]) -> bool:
    rows, columns = parameter.shape[-2:] if parameter.dim() > 1 else (0, 0)
    if parameter.dim() == 3:
        return min(rows, columns) >= LEAST_EXPERT_SIDE
    return parameter.dim() == 2 and min(rows, columns) >= BLOCK and rows not in counts


def parameter_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a parameter is held in when the model is held in `dtype`: float32 where transformers insists on it."""
    strict = sorted(model._keep_in_fp32_modules_strict or ())
    if not strict:
        return dtype
    pattern, _, _ = build_glob_alternation(strict)
    return torch.float32 if pattern.search(name) else dtype


def set_quantised(model: PreTrainedModel, name: str, weight: NF4Weight, dtype: torch.dtype, backend: str) -> None:
    """Puts an NF4 weight in place of the parameter `name`: a quantised linear, or a quantised parameter."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if tuple(owner.get_parameter(leaf).shape) != tuple(weight.shape):
        raise ValueError(f"{name} has shape {weight.shape}, the model wants {tuple(owner.get_parameter(leaf).shape)}")
    if is_plain_linear(owner) and leaf == "weight":
        linear = QuantisedLinear(weight, owner.bias, backend, dtype)
        linear.train(owner.training)
        parent_name, _, child = owner_name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, linear)
    else:
        replace_parameter(owner, leaf, QuantisedParameter(weight, dtype, backend))


def use_plain_experts(model: PreTrainedModel) -> None:
    """Makes mixtures of experts take one expert at a time, which is how quantised ones are decoded."""
    for config in (model.config, model.config.get_text_config()):
        config._experts_implementation = "eager"


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


def recompute_layers(graph: PreTrainedModel) -> None:
    """Has every layer computed again in the backward pass. Raises InputError for a model that cannot."""
    if not graph.supports_gradient_checkpointing:
        raise InputError(
            f"{type(graph).__name__} cannot compute its layers again; set it to none", where="train.recompute"
        )
    graph.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
