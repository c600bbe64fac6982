"""A model of the real shapes with few layers and arbitrary weights: what the dry run and the probe step through."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PretrainedConfig

from fitune.adapters.lora import inject
from fitune.config.schema import RunConfig
from fitune.fuse.lora_linear import fused_lora_layer
from fitune.fuse.model import FusedModel, prepare
from fitune.models.graph import build_graph, head_name, quantised_names
from fitune.quant.linear import QuantisedLinear
from fitune.quant.nf4 import NF4Weight

# Lists in a configuration that say something of every layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration cut to its first decoder layers."""
    small = copy.deepcopy(config)
    total = small.num_hidden_layers
    small.num_hidden_layers = layers
    for name in _PER_LAYER:
        value = getattr(small, name, None)
        if isinstance(value, list) and len(value) == total:
            setattr(small, name, value[:layers])
    return small


def small_model(
    run: RunConfig, config: PretrainedConfig, layers: int, dtype: torch.dtype, backend: str
) -> FusedModel:
    """The run's model cut to `layers`, adapters and fused parts included.

    Weights are whatever memory holds, or fake under FakeTensorMode; only shapes and costs mean anything.
    """
    full = run.method == "full"
    graph = build_graph(with_layers(config, layers), torch.float32 if full else dtype)
    quantised = quantised_names(graph) if run.method == "qlora" else []
    for name in quantised:
        parent, _, leaf = name.rpartition(".")
        old = graph.get_submodule(name)
        bias = None if old.bias is None else torch.zeros(old.out_features, dtype=dtype)
        setattr(graph.get_submodule(parent), leaf, QuantisedLinear(_arbitrary(old), bias, backend))
    for module in graph.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.full(parameter.shape, 0.01, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(value, requires_grad=full)
    graph.tie_weights()
    adapted = None
    if not full:
        adapted = inject(
            graph, head_name(graph), rank=run.lora.rank, alpha=run.lora.alpha, dropout=run.lora.dropout,
            targets=run.lora.targets, rslora=run.lora.rslora, seed=0, base_name="", layer=fused_lora_layer,
        )  # fmt: skip
    model = prepare(graph, adapted, dtype, backend, proofs=False)
    if run.train.recompute == "layers":
        graph.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    graph.train()
    return model


def _arbitrary(linear: nn.Linear) -> NF4Weight:
    n = linear.weight.numel()
    blocks = -(-n // 64)
    return NF4Weight(
        codes=torch.full(((n + 1) // 2, 1), 0x77, dtype=torch.uint8),
        absmax=torch.full((blocks,), 128, dtype=torch.uint8),
        nested_absmax=torch.full((-(-blocks // 256),), 0.01),
        offset=0.01,
        shape=tuple(linear.weight.shape),
        dtype=torch.bfloat16,
    )
