from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from transformers import GPT2Config

from fitune.adapters.targets import left_without_adapter, refused_by_peft, target_names, target_ranks
from fitune.audit.tiny_configs import tiny_config
from fitune.errors import InputError
from fitune.models.graph import build_graph, head_name
from tiny_models import config_of

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def test_all_linear_is_every_linear_but_head_and_routers() -> None:
    graph = build_graph(config_of("qwen3_moe", **EXPERTS), torch.bfloat16)
    names = target_names(graph, head_name(graph), "all-linear")
    ends = {name.rsplit(".", 1)[-1] for name in names}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert left_without_adapter(graph, head_name(graph)) == {}


def test_what_peft_takes_for_experts_is_left_and_told() -> None:
    """PEFT reads `shared_experts.gate_proj` as the gate of older checkpoints' experts, and would adapt these."""
    graph = build_graph(tiny_config("deepseek_v3"), torch.bfloat16)
    left = left_without_adapter(graph, head_name(graph))
    assert "model.layers.*.mlp.shared_experts.gate_proj" in left
    assert not any("shared_experts." in name for name in target_names(graph, head_name(graph), "all-linear"))
    with pytest.raises(InputError, match=r"shared_experts\.gate_proj: PEFT takes its name"):
        target_names(graph, head_name(graph), ["gate_proj", "up_proj"])


def test_ordinary_models_lose_nothing() -> None:
    graph = build_graph(config_of("llama"), torch.bfloat16)
    names = target_names(graph, head_name(graph), "all-linear")
    assert len(names) == 14
    assert refused_by_peft(graph, names) == {}
    assert left_without_adapter(graph, head_name(graph)) == {}


def test_transposed_linears_are_adapted() -> None:
    graph = build_graph(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256), torch.bfloat16)
    names = target_names(graph, head_name(graph), "all-linear")
    assert {name.split(".", 3)[-1] for name in names} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


class Settings(NamedTuple):
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float] = MappingProxyType({})
    targets: str = "all-linear"
    rank: int = 4


def test_a_layer_has_the_rank_of_the_one_key_that_it_fits() -> None:
    """PEFT takes the first that fits, and saves keys in the order of the alphabet: another one could be the first."""
    graph = build_graph(config_of("llama"), torch.bfloat16)
    ranks = target_ranks(graph, head_name(graph), Settings({"q_proj": 8, ".*mlp.*": 2}))
    assert {name.rsplit(".", 1)[-1]: rank for name, rank in ranks.items()} == {
        "q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 2, "up_proj": 2, "down_proj": 2,
    }  # fmt: skip
    told = r"q_proj fits 'self_attn.q_proj' and 'q_proj', with different values"
    with pytest.raises(InputError, match=rf"lora\.rank_pattern: .*{told}"):
        target_ranks(graph, head_name(graph), Settings({"self_attn.q_proj": 64, "q_proj": 8}))
    with pytest.raises(InputError, match=r"lora\.alpha_pattern: .*q_proj fits"):
        target_ranks(graph, head_name(graph), Settings({}, {"q_proj": 64, ".*_proj": 8}))
    assert target_ranks(graph, head_name(graph), Settings({"self_attn.q_proj": 8, "q_proj": 8})) == target_ranks(
        graph, head_name(graph), Settings({"q_proj": 8})
    )
