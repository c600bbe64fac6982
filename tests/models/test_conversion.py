"""Checkpoints read through transformers' conversion rules, against transformers' own loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fitune.errors import InputError
from fitune.models.conversion import GraphTensors
from fitune.models.folder import FolderSource
from fitune.models.graph import build_graph
from tiny_models import config_of

# Experts one by one that the graph stacks and joins; stacked ones it transposes; plain names.
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": {},
}


def folder_of(place: Path, family: str) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **MIXTURES[family]), dtype=torch.bfloat16)
    model.save_pretrained(place)
    return place, model


@pytest.mark.parametrize("family", list(MIXTURES))
def test_every_tensor_is_the_graphs_own(family: str, tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, family)
    source = FolderSource(folder)
    tensors = GraphTensors(source, build_graph(source.config, torch.bfloat16))
    tensors.check()
    assert not tensors.unknown
    expected = model.state_dict()
    assert set(tensors.names) == set(expected)
    for group in tensors.groups:
        for name, value in tensors.read(group).items():
            assert tuple(value.shape) == tensors.shape(name)
            assert torch.equal(value, expected[name]), name
    stacked = [group for group in tensors.groups if not group.is_renamed_only]
    assert bool(stacked) == (family in ("mixtral", "qwen3_moe"))
    if stacked:
        # 4 experts, gate and up.
        assert max(len(group.sources) for group in stacked) == 8


def test_two_experts_exchanged_would_show(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, "mixtral")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    stem = "model.layers.0.block_sparse_moe.experts"
    one, two = f"{stem}.0.w2.weight", f"{stem}.1.w2.weight"
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, path, metadata={"format": "pt"})
    source = FolderSource(folder)
    read = GraphTensors(source, build_graph(source.config, torch.bfloat16))
    (group,) = [each for each in read.groups if one in each.sources]
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(read.read(group)[name], model.state_dict()[name])


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "mixtral")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = torch.zeros(2)
    tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(3)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, path, metadata={"format": "pt"})
    source = FolderSource(folder)
    found = GraphTensors(source, build_graph(source.config, torch.bfloat16))
    with pytest.raises(InputError) as raised:
        found.check()
    said = str(raised.value)
    assert "tensor model.norm.weight is missing" in said
    assert "tensor model.extra.weight is not part of this architecture" in said
    assert "tensor model.layers.0.input_layernorm.weight has shape (3,), the configuration wants (64,)" in said
    assert "inv_freq" not in said


def test_an_expert_that_is_missing_is_an_error(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "mixtral")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["num_local_experts"] == 4
    source = FolderSource(folder)
    with pytest.raises(InputError, match=r"gate_up_proj|experts"):
        GraphTensors(source, build_graph(source.config, torch.bfloat16)).check()
