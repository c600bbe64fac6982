"""Merging where a checkpoint's names are not the graph's; the reference is PEFT's merge, saved by transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Gemma3ForConditionalGeneration,
)

from fitune.adapters.targets import target_names
from fitune.errors import FituneError, InputError
from fitune.export.merging import merge_adapter
from fitune.export.verify import compare_with_adapter
from fitune.models import find_model
from fitune.models.build import build_dense
from fitune.models.folder import FolderSource
from fitune.models.graph import head_name
from fitune.models.source import ModelSource
from fitune.models.text_part import TextPart
from tiny_models import SHAPE, gemma3, tokenizer

MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 48, **MIXTURE},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, **MIXTURE},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
    "phi3": {},
    "gpt2": {},
    # Its checkpoints hold gate, query, key and value in one tensor, gate and up in one; its graph apart.
    "hrm_text": {"head_dim": 16},
}  # fmt: skip
TOKENS = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(3))


def write_base(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    default = AutoConfig.for_model(kind)
    shape = {name: value for name, value in SHAPE.items() if hasattr(default, name)}
    settings = {**shape, **copy.deepcopy(KINDS[kind])}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_adapter(source: ModelSource, folder: Path, targets: list[str] | str = "all-linear") -> Path:
    """An adapter as PEFT writes it, on everything of the graph that takes one, with a B that is not zero."""
    graph = build_dense(source, torch.float32, trainable=False)
    names = target_names(graph, head_name(graph), targets)
    adapted = get_peft_model(graph, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.peft_config["default"].base_model_name_or_path = source.reference
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def adapted_modules(adapter: Path) -> set[str]:
    return {name.rpartition(".lora_")[0] for name in load_file(adapter / "adapter_model.safetensors")}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


def peft_merged(base: Path, adapter: Path, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().to(dtype).save_pretrained(folder)
    return tensors_of(folder)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("mixtral", torch.bfloat16),
        ("qwen2_moe", torch.float32),
        ("qwen3_moe", torch.bfloat16),
        ("deepseek_v3", torch.float32),
        ("phi3", torch.bfloat16),
        ("gpt2", torch.float32),
        ("hrm_text", torch.bfloat16),
    ],
)
def test_the_merged_checkpoint_is_pefts_under_the_bases_names(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "base", kind, dtype)
    source = find_model(str(base))
    adapter = write_adapter(source, tmp_path / "adapter")
    report = merge_adapter(source, adapter, tmp_path / "out", max_shard_bytes=100_000)
    before, found = tensors_of(base), tensors_of(tmp_path / "out")
    expected = peft_merged(base, adapter, tmp_path / "peft", dtype)
    assert set(found) == set(expected) == set(before)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    for name, value in expected.items():
        assert found[name].dtype == before[name].dtype == dtype
        assert torch.allclose(found[name].float(), value.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6), name
        if torch.equal(value, before[name]):
            assert name not in changed
    # Experts, embeddings, norms and routers are the base's bits.
    assert not any(part in name for name in changed for part in (".experts.", "norm", "embed", "wte", "mlp.gate.w"))
    modules = adapted_modules(adapter)
    assert report.merged_tensors == len(modules)
    assert len(changed) == {"hrm_text": 4 * 4}.get(kind, len(modules))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = logits(PeftModel.from_pretrained(plain, str(adapter)))
    difference = (logits(merged) - tuned).square().mean().sqrt() / tuned.std()
    assert difference < {torch.float32: 1e-5}.get(dtype, 0.05)
    assert report.comparison.adapter_effect > 0.02


class Counting(FolderSource):
    """A folder that remembers what was read."""

    def read(self, name: str) -> torch.Tensor:
        self.seen.append(name)
        return super().read(name)


def test_each_tensor_is_read_once_while_the_checkpoint_is_written(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "hrm_text")
    source = Counting(base)
    source.seen = []
    adapter = write_adapter(source, tmp_path / "adapter")
    written: list[int] = []
    source.seen = []

    def progress(done: int, total: int) -> None:
        written.append(len(source.seen))

    merge_adapter(source, adapter, tmp_path / "out", max_shard_bytes=30_000, progress=progress)
    names = source.seen[: written[-1]]
    assert sorted(names) == sorted(set(names)) == sorted(source.tensor_names())
    # Nothing ahead of its time: a group is read when its first tensor is written.
    assert all(count <= place + 1 for place, count in enumerate(written))


@pytest.mark.parametrize("kind", ["mixtral", "hrm_text"])
def test_a_checkpoint_without_the_decoders_prefix_keeps_its_names(tmp_path: Path, kind: str) -> None:
    """As a bare decoder is saved: `layers.0...` where the graph has `model.layers.0...`."""
    base = write_base(tmp_path / "base", kind, torch.float32)
    whole = tensors_of(base)
    bare = {name.removeprefix("model."): value for name, value in whole.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    source = find_model(str(base))
    adapter = write_adapter(source, tmp_path / "adapter")
    merge_adapter(source, adapter, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(bare)
    save_file(whole, base / "model.safetensors", metadata={"format": "pt"})
    merge_adapter(find_model(str(base)), adapter, tmp_path / "out2")
    for name, value in tensors_of(tmp_path / "out2").items():
        assert torch.equal(found[name.removeprefix("model.")], value)


def test_stacked_experts_are_merged_past_too(tmp_path: Path) -> None:
    """A checkpoint that holds the graph's own tensors, experts stacked."""
    base = write_base(tmp_path / "base", "qwen3_moe", torch.float32)
    graph = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stacked = {name: value.contiguous() for name, value in graph.state_dict().items()}
    save_file(stacked, base / "model.safetensors", metadata={"format": "pt"})
    source = find_model(str(base))
    adapter = write_adapter(source, tmp_path / "adapter")
    merge_adapter(source, adapter, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(stacked)
    assert torch.equal(
        found["model.layers.1.mlp.experts.gate_up_proj"], stacked["model.layers.1.mlp.experts.gate_up_proj"]
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek_v3", "model.layers.1.mlp.experts.2.up_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w2.weight"),
        ("hrm_text", "model.L_module.layers.1.mlp.gate_up_proj.weight"),
        ("gpt2", "transformer.h.1.attn.c_proj.weight"),
    ],
)
def test_a_wrong_merge_is_caught(tmp_path: Path, kind: str, name: str) -> None:
    """Halves exchanged, a square weight's delta laid the wrong way round, an expert disturbed."""
    base = write_base(tmp_path / "base", kind, torch.float32)
    source = find_model(str(base))
    adapter = write_adapter(source, tmp_path / "adapter")
    merge_adapter(source, adapter, tmp_path / "out")
    assert compare_with_adapter(tmp_path / "out", source, adapter).is_equal
    merged, plain = tensors_of(tmp_path / "out"), source.read(name)
    if kind == "gpt2":
        wrong = plain + (merged[name] - plain).T
    elif kind == "hrm_text":
        wrong = plain + torch.cat((merged[name] - plain).chunk(2)[::-1])
    else:
        wrong = plain * 1.2
    save_file(merged | {name: wrong.contiguous()}, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert not compare_with_adapter(tmp_path / "out", source, adapter).is_equal


def test_an_adapter_on_a_router_or_an_embedding_is_refused(tmp_path: Path) -> None:
    source = find_model(str(write_base(tmp_path / "base", "mixtral")))
    adapter = write_adapter(source, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for module in ("model.layers.0.mlp.gate", "model.embed_tokens", "model.layers.0.block_sparse_moe.gate"):
        stem = f"base_model.model.{module}"
        more = {f"{stem}.lora_A.weight": torch.ones(4, 64), f"{stem}.lora_B.weight": torch.ones(4, 4)}
        save_file(tensors | more, adapter / "adapter_model.safetensors")
        with pytest.raises(InputError, match=r"only LoRA on linear layers|the base has no tensor"):
            merge_adapter(source, adapter, tmp_path / "out")


@pytest.mark.parametrize("with_graph_names", [False, True])
def test_a_multimodal_model_keeps_its_other_towers(tmp_path: Path, with_graph_names: bool) -> None:
    base = tmp_path / "base"
    model = gemma3().to(torch.bfloat16)
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    (base / "preprocessor_config.json").write_text('{"size": 28}')
    if with_graph_names:  # as others than transformers write it
        state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    source = find_model(str(base))
    assert isinstance(source, TextPart)
    adapter = write_adapter(source, tmp_path / "adapter")
    report = merge_adapter(source, adapter, tmp_path / "out")
    before, found = tensors_of(base), tensors_of(tmp_path / "out")
    assert set(found) == set(before)
    assert report.tensors == len(before)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert len(changed) == report.merged_tensors == 2 * 7
    assert not changed & set(source.carried_names())
    assert (tmp_path / "out" / "preprocessor_config.json").read_bytes() == b'{"size": 28}'
    whole, info = Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    text = build_dense(source, torch.float32, trainable=False)
    tuned = logits(PeftModel.from_pretrained(text, str(adapter)))
    assert (logits(whole) - tuned).square().mean().sqrt() / tuned.std() < 0.05
    assert (logits(gemma3()) - tuned).square().mean().sqrt() / tuned.std() > 0.05
    assert isinstance(find_model(str(tmp_path / "out")), TextPart)


def test_a_multimodal_base_in_four_bits_is_merged_into_what_it_decodes_to(tmp_path: Path) -> None:
    """A base that transformers would read otherwise than we do: built from what the source reads."""
    pytest.importorskip("bitsandbytes")
    gemma3().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForImageTextToText.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, device_map="cpu", quantization_config=settings
    ).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    source = find_model(str(tmp_path / "base"))
    adapter = write_adapter(source, tmp_path / "adapter")
    report = merge_adapter(source, adapter, tmp_path / "out")
    assert report.comparison.is_equal
    found = tensors_of(tmp_path / "out")
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    for name in source.carried_names():
        assert torch.equal(found[name], source.read(name))
    Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)


def test_a_base_in_four_bits_is_merged_into_what_it_decodes_to(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain = write_base(tmp_path / "plain", "phi3")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, device_map="cpu", quantization_config=settings
    ).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    source = find_model(str(tmp_path / "base"))
    adapter = write_adapter(source, tmp_path / "adapter")
    merge_adapter(source, adapter, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(source.tensor_names())
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(found[name], source.read(name))


def test_an_adapter_that_peft_would_not_load_whole_is_no_reference(tmp_path: Path) -> None:
    source = find_model(str(write_base(tmp_path / "base", "phi3")))
    adapter = write_adapter(source, tmp_path / "adapter")
    merge_adapter(source, adapter, tmp_path / "out")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.9.mlp.down_proj.lora_A.weight"] = torch.ones(4, 128)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(FituneError, match="PEFT loads other tensors"):
        compare_with_adapter(tmp_path / "out", source, adapter)
