"""Mutations that the proof must catch, and states in which fused parts must step aside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from fitune.data.collation import collate
from fitune.fuse.gated_mlp import FusedGatedMLP, fused_mlp_candidates
from fitune.fuse.norm import FusedNorm, fused_norm_candidates
from fitune.fuse.prove import prove
from tiny_models import BACKEND, adapted, distance, lora_gradients, model_of, random_samples

DTYPES = [torch.float32, torch.bfloat16]


def part(family: str, kind: str, **settings: Any) -> nn.Module:
    layer = adapted(model_of(family, **settings), fused=True)[0] and model_of(family, **settings).model.layers[0]
    module = layer.mlp if kind == "mlp" else layer.input_layernorm
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "place"), [("llama", 0), ("gemma", 1)])
def test_norms(family: str, place: int, dtype: torch.dtype) -> None:
    norm = part(family, "norm")
    options = fused_norm_candidates(norm, BACKEND)
    verdicts = [prove(norm, option, 64, dtype).holds for option in options]
    assert verdicts == [number == place for number in range(2)]  # the dropped (or added) 1 is caught
    right = options[place]
    for eps in (0.0, right.eps * 1.1, right.eps * 10):
        assert not prove(norm, FusedNorm(norm.weight, eps, right.shift, BACKEND), 64, dtype).holds


@pytest.mark.parametrize("width", [0.02, 0.1])
@pytest.mark.parametrize(("family", "activation"), [("llama", "silu"), ("gemma", "gelu_tanh")])
def test_gated_mlps(family: str, activation: str, width: float) -> None:
    mlp = part(family, "mlp", initializer_range=width)
    for option in fused_mlp_candidates(mlp, BACKEND):
        assert prove(mlp, option, 64, torch.float32).holds == (option.activation == activation)
    swapped = FusedGatedMLP(mlp, activation, BACKEND)
    swapped.gate_proj, swapped.up_proj = mlp.up_proj, mlp.gate_proj
    assert not prove(mlp, swapped, 64, torch.float32).holds


def test_inputs_that_overflow_the_original_in_float16_say_nothing() -> None:
    mlp = part("llama", "mlp", initializer_range=1.0)
    wide, narrow = (mlp.to(dtype)(30 * torch.ones(1, 1, 64, dtype=dtype)) for dtype in (torch.float32, torch.float16))
    assert wide.isfinite().all()
    assert not narrow.isfinite().all()
    assert prove(mlp, FusedGatedMLP(mlp, "silu", BACKEND), 64, torch.float16).holds
    assert not prove(mlp, FusedGatedMLP(mlp, "gelu_tanh", BACKEND), 64, torch.float16).holds


@pytest.mark.parametrize("width", [0.02, 0.1])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu"])
def test_other_activations_are_left_alone(activation: str, width: float) -> None:
    mlp = part("llama", "mlp", initializer_range=width)
    mlp.act_fn = ACT2FN[activation]
    assert not any(prove(mlp, option, 64, torch.float32).holds for option in fused_mlp_candidates(mlp, BACKEND))


def test_a_model_with_another_activation_still_trains_and_the_report_says_why() -> None:
    model, _ = adapted(model_of("llama", hidden_act="gelu"))
    assert "mlp" not in model.report.replaced
    assert "differs by" in model.report.left["mlp (LlamaMLP)"]


def test_attention_that_is_not_covered_is_left_and_the_report_says_why() -> None:
    model, _ = adapted(model_of("llama", attention_dropout=0.1))
    assert model.report.left["attention"] == "attention has dropout (train.model_dropout: 0 turns it off)"
    assert not model.report.packs
    assert model.logprobs(collate([random_samples([9])], 512, 0))[0].isfinite().all()


@pytest.mark.parametrize("state", ["disabled", "two adapters", "dropout", "merged"])
def test_fused_parts_step_aside(state: str) -> None:
    dropout = 0.3 if state == "dropout" else 0.0
    graph = model_of("llama")
    model, ours = adapted(copy.deepcopy(graph), dropout=dropout)
    _, theirs = adapted(graph, fused=False, dropout=dropout)
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for peft in (ours, theirs):
        if state == "two adapters":
            torch.manual_seed(5)
            peft.add_adapter("second", peft.peft_config["default"])
            peft.base_model.set_adapter(["default", "second"])
            for name, parameter in peft.named_parameters():
                if "lora_B.second" in name:
                    nn.init.constant_(parameter, 0.01)
        if state == "merged":
            peft.merge_adapter()
        torch.manual_seed(7)
        if state == "disabled":
            with peft.disable_adapter():
                results.append(peft(input_ids=tokens).logits)
        else:
            results.append(peft(input_ids=tokens).logits)
            if state != "merged":
                results[-1].logsumexp(-1).sum().backward()
        if state == "merged":
            peft.unmerge_adapter()
            results.append(peft(input_ids=tokens).logits)
    half = len(results) // 2
    for found, expected in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if state in ("dropout", "two adapters"):
        found, expected = lora_gradients(ours), lora_gradients(theirs)
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            assert distance(found[name], one) < 1e-4, name
    assert model.report.replaced["linear"] == 14
