"""Fused models against transformers + PEFT: log-probabilities, loss and every LoRA gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fitune.data.batch import Batch
from fitune.data.collation import collate
from fitune.data.encoding import EncodedSample
from fitune.data.prefixes import find_prefixes
from fitune.fuse.model import FusedModel
from tiny_models import BACKEND, FAMILIES, adapted, distance, lora_gradients, model_of, random_samples

WHOLE_PARTS = {"linear", "norm", "mlp", "attention", "layer", "head"}


def their_loss(peft: Any, samples: list[EncodedSample], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-probabilities, one sample at a time, by transformers' own logits; and these."""
    losses, rows = [], []
    for sample in samples:
        tokens = torch.tensor([sample.tokens])
        logits = peft(input_ids=tokens, use_cache=False).logits[0].float()
        logprobs = logits[:-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        chosen = logprobs[torch.tensor(sample.trained[1:])]
        rows.append(chosen.detach())
        losses.append(-chosen.sum())
    return torch.stack(losses).sum(), torch.cat(rows)


def our_loss(model: FusedModel, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    parts = [model.logprobs(batch)[0] for batch in batches]
    return -sum(part.sum() for part in parts), torch.cat([part.detach() for part in parts])


def compare(family: str, dtype: torch.dtype, samples: list[EncodedSample], batches: list[Batch], **settings: Any):
    exact_graph = model_of(family, **settings)
    plain_graph, fused_graph = (copy.deepcopy(exact_graph).to(dtype) for _ in range(2))
    _, exact = adapted(exact_graph, fused=False)
    _, plain = adapted(plain_graph, fused=False)
    model, peft = adapted(fused_graph, dtype)
    results = []
    for loss, rows in (their_loss(exact, samples), their_loss(plain, samples), our_loss(model, batches)):
        loss.backward()
        results.append((loss.detach(), rows))
    gradients = [lora_gradients(one) for one in (exact, plain, peft)]
    assert gradients[0].keys() == gradients[1].keys() == gradients[2].keys()
    return model, results, gradients


@pytest.mark.parametrize("family", list(FAMILIES))
def test_float32(family: str) -> None:
    samples = random_samples([5, 19, 12, 30])
    model, results, gradients = compare(family, torch.float32, samples, [collate([samples], 512, 0)])
    assert set(model.report.replaced) == WHOLE_PARTS, model.report
    assert not model.report.left
    assert model.report.replaced["linear"] == 14
    assert model.report.replaced["mlp"] == model.report.replaced["layer"] == 2
    assert model.report.replaced["norm"] == (9 if family in ("qwen3", "gemma2") else 5)
    (loss, rows), _, (our, our_rows) = results
    torch.testing.assert_close(our, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_rows, rows, rtol=1e-4, atol=1e-4)
    for name, expected in gradients[0].items():
        assert distance(gradients[2][name], expected) < 1e-4, name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_bfloat16_is_at_most_twice_as_far_from_float32_as_transformers(family: str) -> None:
    samples = random_samples([50, 40, 64])
    model, results, gradients = compare(family, torch.bfloat16, samples, [collate([samples], 512, 0)])
    assert set(model.report.replaced) == WHOLE_PARTS, model.report
    (_, rows), (_, their_rows), (_, our_rows) = results
    assert distance(our_rows, rows) <= 2 * distance(their_rows, rows)
    exact, theirs, ours = (torch.cat([g[name].flatten() for name in gradients[0]]) for g in gradients)
    assert distance(ours, exact) <= 2 * distance(theirs, exact)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_rows_equal_rows_apart(family: str) -> None:
    samples = random_samples([5, 19, 12, 30, 8])
    model, peft = adapted(model_of(family))
    packed = our_loss(model, [collate([samples[:3], samples[3:]], 512, 0)])
    packed[0].backward()
    one = lora_gradients(peft)
    apart = our_loss(model, [collate([[sample]], 512, 0) for sample in samples])
    apart[0].backward()
    torch.testing.assert_close(packed[1], apart[1], rtol=1e-5, atol=1e-5)
    for name, expected in lora_gradients(peft).items():
        assert distance(one[name], expected) < 1e-5, name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_shared_beginnings_change_nothing(family: str) -> None:
    samples = random_samples([40, 44, 52, 39], prompt=3, common=32)
    alone = random_samples([23], seed=9)
    prefixes = find_prefixes([*samples, *alone])
    assert prefixes.group == (0, 0, 0, 0, -1)
    assert prefixes.tokens == (32,)
    shared = collate([[*samples, *alone]], 512, 0, [[(0, 32)] * 4 + [(-1, 0)]])
    assert shared.documents[1:5, 3:].tolist() == [[0, 32]] * 4
    model, peft = adapted(model_of(family))
    ours = our_loss(model, [shared])
    ours[0].backward()
    found = lora_gradients(peft)
    whole = our_loss(model, [collate([[*samples, *alone]], 512, 0)])
    whole[0].backward()
    torch.testing.assert_close(ours[1], whole[1], rtol=1e-5, atol=1e-5)
    for name, expected in lora_gradients(peft).items():
        assert distance(found[name], expected) < 1e-5, name


def test_a_window_shifted_by_one_is_caught() -> None:
    samples = random_samples([30])
    batch = collate([samples], 512, 0)
    right, wrong = (adapted(model_of("mistral", sliding_window=size))[0] for size in (7, 8))
    assert distance(our_loss(right, [batch])[1], our_loss(wrong, [batch])[1]) > 1e-3


def test_without_documents_masks_are_kept() -> None:
    """Padding, a window and packed positions, as transformers itself would be called: generation, evaluation."""
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    packed = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    for family in ("llama", "mistral"):
        expected_graph = model_of(family)
        model, _ = adapted(copy.deepcopy(expected_graph))
        _, peft = adapted(expected_graph, fused=False)
        for arguments in ({}, {"attention_mask": mask}, {"position_ids": packed}):
            with torch.no_grad():
                expected = peft(input_ids=tokens, use_cache=False, **arguments).logits
                found = model.graph(input_ids=tokens, use_cache=False, **arguments).logits
            torch.testing.assert_close(found[:, 6:], expected[:, 6:], rtol=1e-3, atol=1e-4)


def test_full_weights_in_float32_computed_in_bfloat16() -> None:
    """Queries and keys come out of the rotary embedding in float32, values in bfloat16."""
    from fitune.fuse.model import prepare

    samples = random_samples([20, 30])
    graph = model_of("llama").train()
    other = copy.deepcopy(graph)
    model = prepare(graph, None, torch.bfloat16, BACKEND)
    loss, _ = our_loss(model, [collate([samples], 512, 0)])
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = their_loss(other, samples)
    theirs.backward()
    exact_graph = model_of("llama").train()
    exact, _ = their_loss(exact_graph, samples)
    exact.backward()

    def all_of(model):
        return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])

    assert distance(all_of(graph), all_of(exact_graph)) <= 2 * distance(all_of(other), all_of(exact_graph))


@pytest.mark.slow
def test_the_bundled_model() -> None:
    from fitune.models.build import build_dense
    from fitune.models.find import find_model

    source = find_model("bundled")
    exact_graph, graph = build_dense(source, torch.float32, False), build_dense(source, torch.float32, False)
    samples = random_samples([24, 30])
    _, exact = adapted(exact_graph, fused=False)
    model, peft = adapted(graph)
    expected, rows = their_loss(exact, samples)
    found, our_rows = our_loss(model, [collate([samples], 512, 0)])
    expected.backward()
    found.backward()
    torch.testing.assert_close(our_rows, rows, rtol=1e-3, atol=1e-3)
    gradients = lora_gradients(peft)
    for name, one in lora_gradients(exact).items():
        assert distance(gradients[name], one) < 1e-3, name
