"""Graphs that are built on the meta device have what transformers' own loading gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fitune.errors import InputError
from fitune.models.build import build_dense
from fitune.models.find import find_model
from fitune.models.graph import (
    build_graph,
    check_quantised_share,
    head_name,
    is_plain_linear,
    quantised_names,
    quantised_share,
    set_parameter,
)
from tiny_models import FAMILIES, config_of, model_of, write_model

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
}


@pytest.mark.parametrize("case", [*FAMILIES, "gemma2", *ROPES])
def test_buffers_are_transformers_own(case: str) -> None:
    family = "llama" if case in ROPES else case
    settings = ROPES.get(case, {})
    whole = transformers.AutoModelForCausalLM.from_config(config_of(family, **settings), dtype=torch.bfloat16)
    expected = dict(whole.named_buffers())
    graph = build_graph(config_of(family, **settings), torch.bfloat16)
    assert all(parameter.is_meta for parameter in graph.parameters())
    found = dict(graph.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    if case == "llama3":
        plain = dict(model_of("llama").named_buffers())
        assert any(not torch.equal(plain[name], value) for name, value in expected.items())


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("trainable", [False, True])
def test_a_dense_model_is_transformers_own(tmp_path: Path, family: str, trainable: bool) -> None:
    folder = write_model(tmp_path / "model", family, torch.float32)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = build_dense(find_model(str(folder)), torch.float32, trainable).eval()
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(input_ids=tokens).logits, expected(input_ids=tokens).logits)
    assert all(parameter.requires_grad == trainable for parameter in ours.parameters())
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == ours.config.tie_word_embeddings


def test_what_is_quantised() -> None:
    graph = build_graph(config_of("llama"), torch.bfloat16)
    assert head_name(graph) == "lm_head"
    names = quantised_names(graph)
    assert len(names) == 14
    assert "lm_head.weight" not in names
    assert quantised_share(graph, names) > 0.99
    check_quantised_share(graph, names)
    with pytest.raises(InputError, match=r"only \d+% of the weights .* use method: lora or full"):
        check_quantised_share(graph, names[:2])


def test_experts_are_quantised_and_routers_are_not() -> None:
    graph = build_graph(config_of("mixtral", num_local_experts=4, num_experts_per_tok=2), torch.bfloat16)
    names = quantised_names(graph)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert "model.layers.1.mlp.experts.down_proj" in names
    assert not any("mlp.gate" in name for name in names)
    assert quantised_share(graph, names) > 0.98
    # A shared expert's size is no number of experts.
    shared = build_graph(config_of("qwen2_moe", num_experts=8, shared_expert_intermediate_size=96), torch.bfloat16)
    assert "model.layers.0.mlp.shared_expert.gate_proj.weight" in quantised_names(shared)


def test_a_linear_layer_with_a_forward_of_its_own() -> None:
    class Backwards(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    assert is_plain_linear(torch.nn.Linear(4, 3))
    assert is_plain_linear(Backwards(4, 3, device="meta"))
    assert not is_plain_linear(Doubled(4, 3))


def test_no_causal_language_model() -> None:
    with pytest.raises(InputError, match=r"no causal language model for 'vit'"):
        build_graph(transformers.ViTConfig(), torch.float32)


def test_shapes_must_agree() -> None:
    graph = build_graph(config_of("llama"), torch.float32)
    with pytest.raises(ValueError, match=r"has shape \(3,\), the configuration wants \(64,\)"):
        set_parameter(graph, "model.norm.weight", torch.zeros(3))
