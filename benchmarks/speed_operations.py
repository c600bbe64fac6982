"""The operations of a QLoRA step, counted from a model's graph; a multiplication and an addition are two.

M tokens a step in rows of T, P of them predicted; W frozen weights in linear layers of the decoder, [N, K] each, with
adapters of rank R; L layers of H heads of D; hidden size C, vocabulary V.

    frozen products    forward 2 M W, gradient of the input 2 M W           4 M W
    adapters           x A^T and u B^T; v = grad B and v A; the
                       gradients v^T x of A and grad^T u of B               6 M R (N + K), summed over the layers
    attention          causal: M (T + 1) / 2 pairs a head; scores and
                       values forward, four products backward               12 D pairs, times L H
    output head        logits and the gradient of the hidden state          4 P C V

What is computed again (scores in the backward pass, layers under recomputation) is not counted, nor is what is not a
product (norms, rotary, activation, softmax, decoding, the optimizer): arXiv 2204.02311, appendix B, counts alike.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import PretrainedConfig

from fitune.models.dimensions import dimensions
from fitune.models.graph import build_graph, head_name


@dataclass(frozen=True)
class Operations:
    """Of one step, by part."""

    frozen: int
    adapters: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def count_operations(config: PretrainedConfig, rows: int, row_tokens: int, rank: int) -> Operations:
    """Of a step on rows of one document each, all trained but the first token, which nothing predicts."""
    graph = build_graph(config, torch.bfloat16)
    head = head_name(graph)
    layers = [module for name, module in graph.named_modules() if isinstance(module, nn.Linear) and name != head]
    output = graph.get_submodule(head)
    sizes = dimensions(config)
    assert sizes.heads is not None
    assert sizes.head_dim is not None
    tokens = rows * row_tokens
    pairs = tokens * (row_tokens + 1) // 2
    return Operations(
        frozen=4 * tokens * sum(layer.in_features * layer.out_features for layer in layers),
        adapters=6 * tokens * rank * sum(layer.in_features + layer.out_features for layer in layers),
        attention=12 * sizes.head_dim * pairs * sizes.layers * sizes.heads,
        head=4 * rows * (row_tokens - 1) * output.in_features * output.out_features,
    )
