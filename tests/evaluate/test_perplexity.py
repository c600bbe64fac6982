"""Perplexity against a token-by-token computation that knows nothing of rows, padding or pieces."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

from fitune.data.batch import Batch
from fitune.errors import FituneError
from fitune.evaluate import perplexity as room
from fitune.evaluate.perplexity import perplexity

VOCABULARY = 61
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(params=["llama", "gemma2", "mamba"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **HEADS}
    config = transformers.AutoConfig.for_model(
        request.param, vocab_size=VOCABULARY, initializer_range=0.5, state_size=8, **settings
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def packed(rows: list[list[list[int]]], row_tokens: int, counted_from: int) -> Batch:
    """Rows of documents -> a batch in which the tokens from `counted_from` on of each document count."""
    tokens = torch.zeros(len(rows), row_tokens, dtype=torch.long)
    positions, weights = torch.zeros_like(tokens), torch.zeros(len(rows), row_tokens)
    bounds = [0]
    for number, documents in enumerate(rows):
        start = 0
        for document in documents:
            end = start + len(document)
            tokens[number, start:end] = torch.tensor(document)
            positions[number, start:end] = torch.arange(len(document))
            weights[number, start + counted_from : end] = 0.25
            start = end
            bounds.append(number * row_tokens + end)
        if start < row_tokens:
            bounds.append((number + 1) * row_tokens)
    return Batch(tokens, positions, weights, torch.tensor(bounds, dtype=torch.int32))


def token_by_token(model: nn.Module, documents: list[list[int]], counted_from: int) -> tuple[float, int]:
    nats, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for document in documents:
            for place in range(counted_from, len(document)):
                logits = model(torch.tensor([document[:place]])).logits[0, -1].double()
                nats -= float(torch.log_softmax(logits, dim=-1)[document[place]])
                count += 1
    return nats, count


def documents_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("logit_tokens", [512, 7])
def test_equals_token_by_token(model: nn.Module, logit_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LOGIT_TOKENS", logit_tokens)
    documents = documents_of([9, 4, 5, 20, 3, 12])
    batches = [
        packed([documents[0:2], documents[2:3]], 16, counted_from=2),
        packed([documents[3:5], documents[5:]], 24, counted_from=2),
    ]
    nats, count = token_by_token(model, documents, 2)
    model.train()
    seen: list[int] = []
    found = perplexity(model, batches, on_progress=seen.append)
    assert model.training
    assert found.tokens == count == seen[-1]
    assert found.documents == 6
    assert found.negative_log_likelihood_nats == pytest.approx(nats, rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found.perplexity.low <= found.perplexity.value <= found.perplexity.high


def test_packing_changes_nothing_but_a_lost_bound_does(model: nn.Module) -> None:
    documents = documents_of([9, 4, 5])
    together = perplexity(model, [packed([documents], 18, 1)])
    apart = perplexity(model, [packed([[document] for document in documents], 12, 1)])
    assert together.nats_per_token == pytest.approx(apart.nats_per_token, rel=1e-6)
    merged = packed([[documents[0] + documents[1], documents[2]]], 18, 1)
    merged.weights[0, len(documents[0])] = 0  # the same tokens count; only the bound is lost
    assert perplexity(model, [merged]).nats_per_token != pytest.approx(apart.nats_per_token, rel=1e-3)


def test_nothing_to_count_and_broken_models_are_errors(model: nn.Module) -> None:
    batch = packed([documents_of([5])], 6, counted_from=5)
    with pytest.raises(FituneError, match="no token in the data counts"):
        perplexity(model, [batch])
    with pytest.raises(FituneError, match="first token has a weight"):
        perplexity(model, [packed([documents_of([5])], 6, counted_from=0)])
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FituneError, match="not finite"):
        perplexity(model, [packed([documents_of([5])], 6, counted_from=1)])


def test_rows_never_hold_more_logits_than_allowed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    if "past_key_values" not in room.forward_parameters(model):
        pytest.skip("a model without a key-value cache cannot be run in pieces")
    monkeypatch.setattr(room, "LOGIT_TOKENS", 8)
    sizes: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: sizes.append(output.numel() // VOCABULARY)
    )
    perplexity(model, [packed([documents_of([40]), documents_of([3, 3, 3])], 40, counted_from=1)])
    handle.remove()
    assert max(sizes) <= 8
