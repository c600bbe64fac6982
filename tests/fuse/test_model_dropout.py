"""A model's own dropout: what is drawn is what transformers draws, and no fused part leaves it out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fitune.data.collation import collate
from fitune.fuse.model import FusedModel, prepare
from tiny_models import BACKEND, model_of, random_samples

BATCH = collate([random_samples([40])], 64, 0)
OFF = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CASES = [
    ("gpt2", {**OFF, "resid_pdrop": 0.3, "embd_pdrop": 0.2}, True),
    ("gpt2", {**OFF, "attn_pdrop": 0.2}, False),
    ("llama", {"attention_dropout": 0.2}, False),
    ("starcoder2", {"residual_dropout": 0.2, "embedding_dropout": 0.1}, True),
    ("gpt_neox", {"hidden_dropout": 0.2}, True),
]


def made(graph: transformers.PreTrainedModel) -> FusedModel:
    return prepare(graph, None, torch.float32, BACKEND)


def ours(model: FusedModel, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.logprobs(BATCH)[0]


def theirs(graph: transformers.PreTrainedModel, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        logits = graph(input_ids=BATCH.tokens, use_cache=False).logits[0]
    chosen = BATCH.weights.reshape(-1).nonzero().squeeze(1)
    return logits.log_softmax(-1)[chosen - 1, BATCH.tokens[0, chosen]]


@pytest.mark.parametrize(("family", "settings", "packs"), CASES)
def test_it_is_transformers_dropout(family: str, settings: dict[str, Any], packs: bool) -> None:
    graph = model_of(family, **settings)
    original = copy.deepcopy(graph).train()
    model = made(graph)
    assert model.report.packs == packs
    graph.train()
    for seed in (1, 2):
        assert torch.allclose(ours(model, seed), theirs(original, seed), atol=1e-4)
    assert not torch.allclose(ours(model, 1), ours(model, 2), atol=1e-2)
    graph.eval()
    assert torch.equal(ours(model, 1), ours(model, 2))
    assert torch.allclose(ours(model, 1), theirs(original.eval(), 1), atol=1e-4)


@pytest.mark.parametrize("proofs", [True, False])
def test_a_part_with_dropout_of_its_own_is_left(proofs: bool) -> None:
    """Proofs alone would not see it in a model that is in evaluation mode."""
    graph = model_of("llama").eval().requires_grad_(False)
    graph.model.layers[0].mlp.dropout = nn.Dropout(0.2)
    graph.model.layers[1].dropout = 0.2
    report = prepare(graph, None, torch.float32, BACKEND, proofs=proofs).report
    assert report.replaced["mlp"] == 1
    assert report.left["mlp (LlamaMLP)"] == "it has dropout"
    assert "layer" not in report.replaced
    assert "it has dropout" in report.left["layer (LlamaDecoderLayer)"]


def test_dropout_before_the_head_leaves_the_head() -> None:
    graph = model_of("llama").eval()
    graph.before_head = nn.Dropout(0.2)
    assert made(graph).report.left["head"] == "there is dropout before it"
