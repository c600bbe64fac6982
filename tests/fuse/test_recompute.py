"""Layers computed again in the backward pass: the same numbers, and much less kept for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fitune.data.collation import collate
from tiny_models import adapted, lora_gradients, model_of, random_samples

LAYERS = 6
BATCH = collate([random_samples([60, 50, 40])], 512, 0)


def passed(model: Any) -> tuple[torch.Tensor, int]:
    """The log-probabilities of a batch, after their backward pass, and the bytes kept for it, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.graph.parameters()}
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        logprobs, _ = model.logprobs(BATCH)
        size = sum(kept.values())
    logprobs.sum().backward()
    return logprobs.detach(), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite"])
def test_recomputing_keeps_little_and_changes_nothing(family: str, dtype: torch.dtype) -> None:
    found = {}
    for recompute in (False, True):
        model, peft = adapted(model_of(family, dtype, num_hidden_layers=LAYERS), dtype)
        assert model is not None
        assert model.report.replaced["layer"] == LAYERS
        if recompute:
            model.recompute_layers()
        logprobs, size = passed(model)
        found[recompute] = logprobs, size, lora_gradients(peft)
    assert torch.equal(found[True][0], found[False][0])
    assert found[True][1] < found[False][1] / 3
    for name, gradient in found[False][2].items():
        assert torch.equal(found[True][2][name], gradient), name


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {}])
def test_layers_that_go_the_original_way_are_recomputed_too(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout they are not replaced at all; without, replaced but called in a way they do not cover."""
    sizes = []
    for recompute in (False, True):
        model, _ = adapted(model_of("llama", num_hidden_layers=LAYERS), **settings)
        assert model is not None
        if not settings:
            monkeypatch.setattr("fitune.fuse.decoder_layer.covered_all", lambda _: None)
        if recompute:
            model.recompute_layers()
        sizes.append(passed(model)[1])
        monkeypatch.undo()
    assert sizes[1] < sizes[0] / 2
