"""The share of the machine that a run is shown: operations counted by torch itself, rates that were measured."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fitune.fuse.model import FusedModel
from fitune.fuse.replace import FusionReport
from fitune.train import machine_share
from fitune.train.machine_share import MachineShare, product_rate, work_of
from tiny_models import BACKEND, adapted, model_of

TOKENS = 32


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("method", ["full", "lora", "whole"])
def test_operations_are_those_that_torch_counts(method: str, forwards: int) -> None:
    """Of transformers' own layers, every token through the head. The first layer's inputs need no gradient."""
    graph = model_of("llama", num_hidden_layers=8)
    if method == "lora":
        adapted(graph, fused=False)
    if method == "whole":
        adapted(graph, fused=False, whole=["lm_head", "up_proj"])
    tokens = torch.randint(256, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        for _ in range(forwards - 1):
            with torch.no_grad():
                graph(input_ids=tokens)
        graph(input_ids=tokens).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for kind, count in counts.items() if str(kind) in ("aten.mm", "aten.addmm"))
    work = work_of(FusedModel(graph, None, torch.float32, BACKEND, FusionReport()), False, forwards)
    assert work is not None
    assert work.of(TOKENS, TOKENS) == pytest.approx(products, rel=0.05)


def test_layers_that_are_computed_again_cost_a_forward_pass_more() -> None:
    model = FusedModel(model_of("llama"), None, torch.float32, BACKEND, FusionReport())
    once, again = work_of(model, False), work_of(model, True)
    assert once is not None
    assert again is not None
    assert again.per_token == pytest.approx(once.per_token * 8 / 6)
    assert again.per_trained_token == once.per_trained_token


def test_a_step_is_set_against_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FusedModel(model_of("llama"), None, torch.float32, BACKEND, FusionReport())
    work = work_of(model, False)
    assert work is not None
    monkeypatch.setattr(machine_share, "product_rate", lambda dtype: 1e9)
    operations = work.per_token * 100 + work.per_trained_token * 40
    assert MachineShare(model, False).share(100, 40, operations / 1e9) == 1.0
    assert MachineShare(model, False).share(100, 40, operations / 5e8) == 0.5


def test_experts_are_not_guessed_at() -> None:
    model = FusedModel(model_of("mixtral"), None, torch.float32, BACKEND, FusionReport())
    assert work_of(model, False) is None
    assert MachineShare(model, False).share(100, 40, 1.0) is None


def test_a_rate_is_one() -> None:
    assert 1e8 < product_rate(torch.float32) < 1e15
