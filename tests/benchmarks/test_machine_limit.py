"""Operations are what torch itself counts in a model with adapters, and a fraction is what the formula says."""

from __future__ import annotations

import machine_limit
import pytest
import torch
from peft import LoraConfig, get_peft_model
from speed_operations import Operations, count_operations
from tiny_case import TINY
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

RANK, BATCH, TOKENS = 3, 2, 16


def test_operations_are_those_that_torch_counts() -> None:
    config = AutoConfig.for_model(**dict(TINY.shape or {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    tokens = torch.randint(100, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    adapted.get_input_embeddings().weight.requires_grad_(False)
    model.enable_input_require_grads()  # the first layer's input gradient counts, as in the formula
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        nn.functional.linear(hidden, model.lm_head.weight.detach()).sum().backward()
    count = count_operations(config, BATCH, TOKENS, RANK)
    # Torch multiplies all pairs of tokens, of which (T + 1) / 2T are causal.
    squared = count.attention * 2 * TOKENS // (TOKENS + 1)
    assert counter.get_total_flops() == count.total - count.attention + squared


def test_the_fraction_takes_every_part_at_its_own_limit() -> None:
    counted = Operations(frozen=600, adapters=100, attention=200, head=100)
    rates = {"bfloat16": 100.0, "int8": 200.0}
    assert counted.total == 1000
    assert machine_limit.limit_seconds(counted, "bfloat16", rates) == pytest.approx(10.0)
    assert machine_limit.limit_seconds(counted, "int8", rates) == pytest.approx(7.0)
    assert machine_limit.limit_seconds(counted, "float32", rates) is None
    row = {
        "case": "a", "compute": "int8", "tokens_per_second": 5.0, "step_seconds": [14.0],
        "operations": {"frozen": 600, "adapters": 100, "attention": 200, "head": 100, "total": 1000},
    }  # fmt: skip
    machine_limit.set_fractions([row, {"case": "b", "compute": "int8", "problem": "x", "is_refusal": True}], rates)
    assert row["fraction_of_limit"] == pytest.approx(0.5)
    assert len(machine_limit.row_cells(row)) == len(machine_limit.COLUMNS)


def test_limits_are_measured_in_every_format_there_is() -> None:
    limits = machine_limit.Limits(64)
    assert limits.rates() == {}
    limits.measure()
    assert {"bfloat16", "float32"} <= limits.rates().keys()
    assert min(limits.rates().values()) > 0
