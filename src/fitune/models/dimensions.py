"""How large a model is, from its configuration alone: the graph is built without weights and counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from fitune.errors import InputError
from fitune.kernels.reference import BLOCK, NESTED_BLOCK
from fitune.models.graph import build_graph, quantised_names


@dataclass(frozen=True)
class Dimensions:
    """A model's sizes. Fields that its configuration does not have are None.

    Attributes:
        expert_feed_forward: of each expert, where it is not `feed_forward`.
        parameters: a tied output head counts once.
        bytes_16bit: all weights in 16 bits.
        bytes_nf4: with every quantised matrix in NF4, double quantisation included, the rest in 16 bits.
        why_no_nf4: why `bytes_nf4` is None.
    """

    architecture: str
    layers: int
    hidden_size: int
    feed_forward: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    experts: int | None
    experts_per_token: int | None
    expert_feed_forward: int | None
    vocabulary: int
    context_tokens: int | None
    is_tied: bool
    parameters: int
    bytes_16bit: int
    bytes_nf4: int | None
    why_no_nf4: str | None


def dimensions(config: PretrainedConfig) -> Dimensions:
    """The sizes of the model of `config`; InputError where transformers has no causal language model for it."""
    graph = build_graph(config, torch.bfloat16)
    sizes = {name: parameter.numel() for name, parameter in graph.named_parameters()}
    total = sum(sizes.values())
    nf4: int | None = None
    why_not: str | None = None
    try:
        quantised = quantised_names(graph)
    except InputError as error:
        why_not = str(error)
    else:
        nf4 = 2 * total + sum(nf4_bytes(sizes[name]) - 2 * sizes[name] for name in quantised)
    text = config.get_text_config()
    experts = _number(text, "num_local_experts") or _number(text, "num_experts")
    heads, hidden = _number(text, "num_attention_heads"), int(text.hidden_size)
    return Dimensions(
        architecture=config.model_type,
        layers=int(text.num_hidden_layers),
        hidden_size=hidden,
        feed_forward=_number(text, "intermediate_size"),
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=_number(text, "head_dim") or (hidden // heads if heads else None),
        experts=experts,
        experts_per_token=_number(text, "num_experts_per_tok") if experts else None,
        expert_feed_forward=_number(text, "moe_intermediate_size") if experts else None,
        vocabulary=int(text.vocab_size),
        context_tokens=_number(text, "max_position_embeddings"),
        is_tied=bool(getattr(config, "tie_word_embeddings", False)),
        parameters=total,
        bytes_16bit=2 * total,
        bytes_nf4=nf4,
        why_no_nf4=why_not,
    )


def nf4_bytes(count: int) -> int:
    """Bytes of `count` weights in NF4: 4-bit codes, 8-bit scales of blocks, float32 scales of those, an offset."""
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4


def _number(config: PretrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None
