from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from fitune.errors import DiskFullError, FituneError, InputError
from fitune.export.merging import merge_adapter
from fitune.export.verify import compare_with_adapter
from fitune.models import shards
from fitune.models.bundled import open_bundled
from fitune.models.folder import FolderSource

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.tensor([[5, 9, 200, 3, 3, 77, 41, 18]])


def save_base(folder: Path, dtype: torch.dtype = torch.bfloat16, config: Any = None) -> Path:
    torch.manual_seed(0)
    config = config or LlamaConfig(**SIZES, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0])
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """An adapter as PEFT writes it, with a B that is not zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(base, tmp_path / "adapter")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits.float()


def peft_merged_weights(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """PEFT's own merge in float32, cast once: the independent reference."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: tensor.to(dtype) for name, tensor in merged.state_dict().items()}


def assert_nothing_left(folder: Path, *allowed: str) -> None:
    assert sorted(os.listdir(folder)) == sorted(allowed)


@pytest.mark.parametrize(
    ("lora", "dtype"),
    [
        ({}, torch.bfloat16),
        ({}, torch.float16),
        ({}, torch.float32),
        ({"use_rslora": True, "r": 8}, torch.float32),
        ({"use_dora": True, "use_rslora": True}, torch.float32),
        ({"use_dora": True}, torch.bfloat16),
        (
            {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6}, "alpha_pattern": {"down_proj": 3}},
            torch.float32,
        ),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, torch.float32),
    ],
)
def test_merged_weights_and_logits_equal_pefts(tmp_path: Path, lora: dict[str, Any], dtype: torch.dtype) -> None:
    base = save_base(tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **lora)
    seen: list[tuple[int, int]] = []
    report = merge_adapter(
        FolderSource(base), adapter, tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    expected = peft_merged_weights(base, adapter, dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.allclose(found[name].float(), tensor.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6), name
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = logits(PeftModel.from_pretrained(plain, str(adapter)))
    scale = tuned.std()
    assert (logits(merged) - tuned).abs().max() < {torch.float32: 1e-4, torch.float16: 1e-2}.get(dtype, 0.1) * scale
    assert report.comparison.adapter_effect > 0.02
    assert report.comparison.is_equal
    assert seen[-1] == (report.weight_bytes, report.weight_bytes)
    assert_nothing_left(tmp_path, "adapter", "base", "out")


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES | {"vocab_size": 257}, tie_word_embeddings=True, initializer_range=0.2)
    base = save_base(tmp_path / "base", torch.float32, config)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge_adapter(FolderSource(base), adapter, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(PeftModel.from_pretrained(plain, str(adapter))), atol=1e-4)
    # An adapter on the tied head cannot be merged without changing the embeddings as well.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(
        tmp_path / "head", save_embedding_layers=False
    )
    with pytest.raises(InputError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        merge_adapter(FolderSource(base), tmp_path / "head", tmp_path / "out2")


@pytest.mark.parametrize("dora", [False, True])
def test_transposed_weights_as_in_gpt2(tmp_path: Path, dora: bool) -> None:
    config = GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2)
    base = save_base(tmp_path / "base", torch.float32, config)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=dora)
    report = merge_adapter(FolderSource(base), adapter, tmp_path / "out")
    assert report.merged_tensors == 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(PeftModel.from_pretrained(plain, str(adapter))), atol=1e-4)


def test_shards_index_and_companions(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = merge_adapter(FolderSource(base), adapter, out, max_shard_bytes=40_000)
    assert len(report.files) > 2
    assert all(path.is_file() for path in report.files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.weight_bytes
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert report.tokenizer_from == "base"


def test_a_tokenizer_saved_with_the_adapter_wins(base: Path, adapter: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "another"
    tokenizer.save_pretrained(adapter)
    report = merge_adapter(FolderSource(base), adapter, tmp_path / "out")
    assert report.tokenizer_from == "adapter"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "another"


def _change_tensors(adapter: Path, **changed: torch.Tensor | None) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors: dict[str, Any] = load_file(path) | {key.replace("__", "."): value for key, value in changed.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


def _change_config(adapter: Path, **changed: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


Q = "base_model__model__model__layers__0__self_attn__q_proj__lora_"


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (
            {"base_model__model__model__layers__7__mlp__up_proj__lora_A__weight": torch.ones(4, 64)},
            {},
            "partner",
        ),
        ({"base_model__model__lm_head__weight": torch.ones(256, 64)}, {}, "no part of a LoRA pair"),
        ({f"{Q}A__weight": torch.ones(4, 63)}, {}, r"does not fit a weight of \(64, 64\)"),
        ({f"{Q}A__weight": torch.ones(5, 64)}, {}, "does not fit"),
        ({f"{Q}A__weight": None}, {}, "without its partner"),
        ({f"{Q}A__weight": torch.full((4, 64), float("nan"))}, {}, "not finite"),
        ({f"{Q}magnitude_vectors": torch.ones(64)}, {}, "no part of a LoRA pair"),
        ({f"{Q}magnitude_vector": torch.ones(64)}, {}, "lora_magnitude_vector is there, and use_dora is False"),
        ({}, {"use_dora": True}, "lora_magnitude_vector is missing, and use_dora is True"),
        ({}, {"bias": "all"}, "biases"),
        ({}, {"peft_type": "IA3"}, "'IA3'"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({}, {"some_future_field": 3}, "some_future_field is 3"),
        ({}, {"base_model_name_or_path": "owner/other"}, "its base is 'owner/other'"),
        ({}, {"r": 0}, "r must be a positive number"),
    ],
)
def test_mutated_adapters_are_refused(
    base: Path, adapter: Path, tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    _change_tensors(adapter, **tensors)
    _change_config(adapter, **config)
    with pytest.raises(InputError, match=words):
        merge_adapter(FolderSource(base), adapter, tmp_path / "out")
    assert_nothing_left(tmp_path, "adapter", "base")


def test_an_extra_pair_without_a_place_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    at = "base_model__model__model__layers__7__mlp__up_proj__lora_"
    _change_tensors(adapter, **{f"{at}A__weight": torch.ones(4, 64), f"{at}B__weight": torch.ones(96, 4)})
    with pytest.raises(InputError, match=r"no tensor model\.layers\.7\.mlp\.up_proj\.weight"):
        merge_adapter(FolderSource(base), adapter, tmp_path / "out")


def test_the_stored_identity_decides(base: Path, adapter: Path, tmp_path: Path) -> None:
    source = FolderSource(base)
    written = {"reference": "elsewhere", "identity": source.identity()}
    (adapter / "base.json").write_text(json.dumps(written))
    _change_config(adapter, base_model_name_or_path="elsewhere")
    merge_adapter(source, adapter, tmp_path / "out")
    (adapter / "base.json").write_text(json.dumps(written | {"identity": "0" * 32}))
    with pytest.raises(InputError, match="another model, or its weights changed"):
        merge_adapter(source, adapter, tmp_path / "out2")
    merge_adapter(source, adapter, tmp_path / "out2", allow_other_base=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wrong_merge_is_caught(tmp_path: Path, dtype: torch.dtype) -> None:
    """Mutations of the written file that must not pass: a module left out, one scaled twice, one gone."""
    base = save_base(tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter")
    source, out = FolderSource(base), tmp_path / "out"
    merge_adapter(source, adapter, out)
    assert compare_with_adapter(out, source, adapter).is_equal
    merged, name = load_file(out / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    plain = source.read(name)
    for wrong in (plain, (2 * merged[name].float() - plain.float()).to(dtype)):
        save_file(merged | {name: wrong}, out / "model.safetensors", metadata={"format": "pt"})
        assert not compare_with_adapter(out, source, adapter).is_equal
    gone = {key: tensor for key, tensor in merged.items() if key != name}
    save_file(gone, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FituneError, match="does not load whole"):
        compare_with_adapter(out, source, adapter)


def test_a_failure_in_the_middle_leaves_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(FolderSource(base), adapter, tmp_path / "deep" / "out", progress=stop)
    assert_nothing_left(tmp_path / "deep")


def test_what_stands_at_the_output_is_kept_unless_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        merge_adapter(FolderSource(base), adapter, out)
    _change_config(adapter, use_dora=True)
    with pytest.raises(InputError):
        merge_adapter(FolderSource(base), adapter, out, overwrite=True)
    assert (out / "precious.txt").read_text() == "mine"
    _change_config(adapter, use_dora=False)
    merge_adapter(FolderSource(base), adapter, out, overwrite=True)
    assert not (out / "precious.txt").exists()
    assert (out / "model.safetensors").is_file()
    assert_nothing_left(tmp_path, "adapter", "base", "out")


def test_too_little_room_is_said_before_anything_is_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A base with more (sparse) embeddings than the disk has room for."""
    free = shutil.disk_usage(tmp_path).free
    weights = load_file(base / "model.safetensors")
    plans = [shards.TensorPlan(name, tuple(t.shape), t.dtype) for name, t in weights.items()]
    rows = free // 128 + 1_000_000
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"vocab_size": rows, "tie_word_embeddings": True}))
    huge = shards.TensorPlan("model.embed_tokens.weight", (rows, 64), torch.bfloat16)
    plans = [plan for plan in plans if plan.name not in (huge.name, "lm_head.weight")]
    header = shards._header([*plans, huge])
    with (base / "model.safetensors").open("wb") as file:
        file.write(header)
        try:
            file.truncate(len(header) + sum(plan.size_bytes for plan in [*plans, huge]))
        except OSError as error:
            pytest.skip(f"this file system has no sparse files that large: {error}")
    with pytest.raises(DiskFullError, match="GB are free"):
        merge_adapter(FolderSource(base), adapter, tmp_path / "out")
    assert_nothing_left(tmp_path, "adapter", "base")


@pytest.mark.slow
def test_the_bundled_model_merges(tmp_path: Path) -> None:
    try:
        source = open_bundled()
    except InputError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in source.tensor_names():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            rows, columns = source.shape(name)
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(8, columns, generator=generator) / columns**0.5
            tensors[f"{stem}.lora_B.weight"] = 0.05 * torch.randn(rows, 8, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    config.base_model_name_or_path = "bundled"
    config.save_pretrained(adapter)
    report = merge_adapter(source, adapter, tmp_path / "out", max_shard_bytes=100_000_000)
    assert report.merged_tensors == 60
    assert len(report.files) == 3
    assert report.comparison.is_equal
    assert "Q4_1" in str(report.note)
