"""Modules that an adapter has whole, merged where a checkpoint's names are not the graph's, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fitune.adapters.lora import inject, save_adapter
from fitune.errors import InputError
from fitune.export.merging import merge_adapter
from fitune.models import find_model
from fitune.models.build import build_dense
from fitune.models.graph import head_name
from fitune.models.source import ModelSource
from tiny_models import SHAPE, distance, gemma3, tokenizer

TOKENS = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(3))


def phi3() -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi3", **{**SHAPE, "original_max_position_embeddings": 512})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write_adapter(source: ModelSource, folder: Path, names: tuple[str, ...]) -> Path:
    graph = build_dense(source, torch.float32, trainable=False)
    model = inject(
        graph, head_name(graph), rank=4, alpha=8, dropout=0, targets="all-linear", rslora=False, seed=1,
        base_name=source.reference, whole=names,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    base = {"reference": source.reference, "identity": source.identity()}
    save_adapter(model, folder, base, source.outer_module)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits.float()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gemma3", ("embed_tokens", "norm")),
        ("gemma3 tied", ("embed_tokens", "q_norm")),
        ("phi3", ("lm_head", "qkv_proj", "input_layernorm")),
    ],
)
def test_merged_it_is_what_peft_makes_of_the_whole_model(tmp_path: Path, kind: str, names: tuple[str, ...]) -> None:
    def made() -> PreTrainedModel:
        return phi3() if kind == "phi3" else gemma3("tied" in kind)

    made().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    source = find_model(str(tmp_path / "base"))
    adapter = write_adapter(source, tmp_path / "adapter", names)
    report = merge_adapter(source, adapter, tmp_path / "out")
    assert report.comparison.is_equal
    before, found = (
        load_file(tmp_path / "base" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert set(found) == set(before)
    assert sum(not torch.equal(found[name], before[name]) for name in found) == report.merged_tensors
    theirs = PeftModel.from_pretrained(made(), str(adapter))
    merged = type(made()).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert distance(logits(merged), logits(theirs)) < 1e-4
    assert distance(logits(made()), logits(theirs)) > 0.05


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("model.norm.weight", torch.ones(63), r"model.norm.weight is \(63,\), the base's is \(64,\)"),
        ("model.norm.weight", torch.full((64,), float("nan")), "holds values that are not finite"),
        ("model.norms.weight", torch.ones(64), "model.norms.weight is no weight of the model"),
        (
            "model.norm.weight",
            None,
            r"modules_to_save has 'model.norm', and adapter_model.safetensors no such tensor",
        ),
    ],
)
def test_what_has_no_place_is_refused(tmp_path: Path, name: str, value: torch.Tensor | None, told: str) -> None:
    phi3().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    source = find_model(str(tmp_path / "base"))
    adapter = write_adapter(source, tmp_path / "adapter", ("norm",))
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{name}"
    changed = {one: v for one, v in tensors.items() if one != key} | ({} if value is None else {key: value})
    save_file(changed, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=told):
        merge_adapter(source, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
