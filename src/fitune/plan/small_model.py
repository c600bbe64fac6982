"""A model of the real shapes with few layers and arbitrary weights: what the dry run and the probe step through."""

from __future__ import annotations

from math import prod

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fitune.adapters.lora import inject
from fitune.config.schema import RunConfig
from fitune.fuse.adapter_layers import unmeasured_lora_layer
from fitune.fuse.int8_calibration import recode_unseen
from fitune.fuse.model import FusedModel, prepare
from fitune.kernels.reference import BLOCK, NESTED_BLOCK
from fitune.models.graph import (
    build_graph,
    head_name,
    parameter_dtype,
    quantised_names,
    set_quantised,
    use_plain_experts,
)
from fitune.plan.anatomy import Layers
from fitune.plan.layer_watch import cut
from fitune.quant.nf4 import NF4Weight


def small_model(
    run: RunConfig, config: PretrainedConfig, layers: Layers, dtype: torch.dtype, backend: str, filled: bool = True
) -> tuple[FusedModel, str]:
    """The run's model cut to its first `layers.kept` layers, adapters and fused parts included.

    Comes with the name of transformers' own attention, which fused attention took the place of.

    Weights are arbitrary; only shapes and costs mean anything. Unless they are `filled` their memory is never
    touched, so that a model far larger than the machine can be dry-run on it.
    """
    full = run.method == "full"
    dtype_held = torch.float32 if full else dtype
    graph = build_graph(config, dtype_held)
    cut(graph, layers)
    quantised = quantised_names(graph) if run.method == "qlora" else []
    if quantised:
        use_plain_experts(graph)
    made = {name: _arbitrary(tuple(graph.get_parameter(name).shape), filled) for name in quantised}
    for name, weight in made.items():
        set_quantised(graph, name, weight, dtype, backend)
    for target, origin in list(graph.all_tied_weights_keys.items()):
        if origin in made:  # layers that share weights: one NF4 weight, a module for each
            set_quantised(graph, target, made[origin], dtype, backend)
            del graph.all_tied_weights_keys[target]
    _fill(graph, dtype_held, full, filled)
    graph.tie_weights()
    adapted = None
    if not full:
        adapted = inject(
            graph, head_name(graph), rank=run.lora.rank, alpha=run.lora.alpha, dropout=run.lora.dropout,
            targets=run.lora.targets, rslora=run.lora.rslora, seed=0, base_name="", layer=unmeasured_lora_layer,
            rank_pattern=run.lora.rank_pattern, alpha_pattern=run.lora.alpha_pattern, dora=run.lora.dora,
            whole=run.lora.modules_to_save, with_values=filled,
        )  # fmt: skip
    plain_attention = graph.config._attn_implementation
    model = prepare(graph, adapted, dtype, backend, proofs=False)
    if run.train.recompute == "layers":
        model.recompute_layers()
    graph.train()
    if run.train.compute == "int8":
        recode_unseen(model, filled)
    return model, plain_attention


def _fill(graph: PreTrainedModel, dtype: torch.dtype, trainable: bool, filled: bool) -> None:
    """Memory for every parameter on the meta device; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for owner, module in graph.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                floating = parameter.is_floating_point()
                held = parameter_dtype(graph, f"{owner}.{name}", dtype) if floating else parameter.dtype
                value = torch.empty(parameter.shape, dtype=held)
                if filled:
                    value.fill_(0.01 if floating else 0)
                made[id(parameter)] = nn.Parameter(value, requires_grad=trainable and floating)
            module._parameters[name] = made[id(parameter)]


def _arbitrary(shape: tuple[int, ...], filled: bool) -> NF4Weight:
    n = prod(shape)
    blocks = -(-n // BLOCK)
    codes = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.uint8)
    return NF4Weight(
        codes=codes.fill_(0x77) if filled else codes,
        absmax=absmax.fill_(128) if filled else absmax,
        nested_absmax=torch.full((-(-blocks // NESTED_BLOCK),), 0.01),
        offset=0.01,
        shape=shape,
        dtype=torch.bfloat16,
    )
