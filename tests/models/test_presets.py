"""Presets: each builds to the published number of parameters, is found by its names, and has no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny_models
from fitune.errors import InputError
from fitune.models.find import find_model
from fitune.models.graph import build_graph
from fitune.models.preset_table import PRESETS, Preset
from fitune.models.presets import (
    PresetSource,
    family_of,
    find_preset,
    near_presets,
    open_to_plan,
    preset_config,
    preset_like,
)


def by_name(name: str) -> Preset:
    return next(preset for preset in PRESETS if preset.name == name)


def count(config: transformers.PretrainedConfig) -> int:
    return sum(parameter.numel() for parameter in build_graph(config, torch.bfloat16).parameters())


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_the_graph_has_the_published_number_of_parameters(preset: Preset) -> None:
    found = count(preset_config(preset)) + preset.beyond
    assert found == (pytest.approx(preset.published, rel=0.1) if preset.is_rounded else preset.published)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama-3-8b", "num_key_value_heads", 4),
        ("llama-2-13b", "intermediate_size", 13825),
        ("qwen2-7b", "vocab_size", 151936),
        ("gemma-7b", "head_dim", 192),
        ("gemma-2b", "tie_word_embeddings", False),
        ("glm-4-9b", "attention_bias", False),
        ("mixtral-8x7b", "num_local_experts", 7),
        ("codellama-7b", "vocab_size", 32000),
    ],
)
def test_a_wrong_dimension_is_another_number(name: str, field: str, value: Any) -> None:
    preset = by_name(name)
    config = preset_config(preset)
    assert getattr(config, field) != value
    setattr(config, field, value)
    assert count(config) + preset.beyond != preset.published


@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-3-12b", "gemma-3-27b"])
def test_with_its_vision_tower_gemma_3_has_the_published_number(name: str) -> None:
    """The tower is SigLIP So400m/14 at 896 pixels (Gemma 3 report, arXiv 2503.19786, section 2)."""
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
             "image_size": 896, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    text = {key: value for key, value in by_name(name).config.items() if key != "model_type"}
    config = transformers.Gemma3Config(text_config=text, vision_config=tower)
    with torch.device("meta"):
        whole = transformers.Gemma3ForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in whole.parameters()) == by_name(name).published


REAL = {
    "llama-2-7b-chat-hf": "llama-2-7b",
    "Meta-Llama-3-8B-Instruct": "llama-3-8b",
    "Mistral-7B-Instruct-v0.2": "mistral-7b-v0.2",
    "Qwen2-7B-Instruct": "qwen2-7b",
    "Qwen2.5-3B-Instruct": "qwen2.5-3b",
    "chatglm3-6b": "chatglm3-6b",
}
OLD_NAMES = {
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "multi_query_group_num": "num_key_value_heads",
    "padded_vocab_size": "vocab_size",
    "kv_channels": "head_dim",
    "add_qkv_bias": "attention_bias",
}


@pytest.mark.parametrize(("folder", "name"), REAL.items())
def test_real_configurations_say_the_same(shared_data: Path, folder: str, name: str) -> None:
    """All but the contexts: the copies at hand were shortened by whoever ran them on small devices."""
    written = json.loads((shared_data / "model_configs" / folder / "config.json").read_text())
    written = {OLD_NAMES.get(key, key): value for key, value in written.items()}
    written.setdefault("num_key_value_heads", written["num_attention_heads"])
    preset = by_name(name)
    compared = set(preset.config) & set(written) - {"model_type", "max_position_embeddings", "eos_token_id"}
    assert len(compared) >= 7
    assert {key: preset.config[key] for key in compared} == {key: written[key] for key in compared}
    assert find_preset(folder) is preset


def test_every_name_leads_to_its_own_preset() -> None:
    assert len({preset.name for preset in PRESETS}) == len(PRESETS)
    for preset in PRESETS:
        assert find_preset(preset.name) is preset
        for hub in preset.hub:
            assert find_preset(hub) is preset, hub
            assert find_preset(hub.partition("/")[2].upper()) is preset, hub


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("LLaMA2-13B", "llama-2-13b"),
        ("llama_2_13b", "llama-2-13b"),
        ("llama-3-1-8b", "llama-3.1-8b"),
        ("CodeLlama 13B", "codellama-13b"),
        ("code-llama-13b", "codellama-13b"),
        ("Qwen2_5-7B", "qwen2.5-7b"),
        ("gemma2-2b", "gemma-2-2b"),
        ("gemma-2b", "gemma-2b"),
        ("chat-glm3-6b", "chatglm3-6b"),
        ("Phi3 mini", "phi-3-mini"),
        ("meta-llama/Llama-2-13b-hf@main", "llama-2-13b"),
    ],
)
def test_spellings(words: str, name: str) -> None:
    assert find_preset(words) is by_name(name)


@pytest.mark.parametrize(
    "words", ["qwen2-57b", "llama-31-8b", "llama", "", "gemma-22b", "x/y", "me/gemma-7b", "./gemma-7b"]
)
def test_what_is_no_name_is_not_guessed(words: str) -> None:
    assert find_preset(words) is None


def test_a_preset_has_shapes_and_no_weights(tmp_path: Path) -> None:
    source = PresetSource(by_name("mistral-7b-v0.1"))
    assert (source.kind, source.config.model_type, source.config.dtype) == ("preset", "mistral", torch.bfloat16)
    name = "model.layers.31.self_attn.k_proj.weight"
    assert (source.shape(name), source.dtype(name)) == ((1024, 4096), torch.bfloat16)
    assert sum(torch.Size(source.shape(each)).numel() for each in source.tensor_names()) == 7_241_732_096
    with pytest.raises(KeyError):
        source.dtype("no such tensor")
    for use in (
        lambda: source.read(name),
        source.tokenizer,
        source.generation_config,
        source.files,
        source.fingerprint,
        lambda: source.write_companions(tmp_path),
    ):
        with pytest.raises(InputError, match="a preset has dimensions only, no weights; give a folder"):
            use()


def test_what_is_on_disk_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_to_plan("gemma-7b").kind == "preset"
    tiny_models.write_model(tmp_path / "gemma-7b")
    assert open_to_plan("gemma-7b").kind == "folder"


def test_a_hub_name_that_is_not_cached_is_planned_by_its_preset() -> None:
    source = open_to_plan("meta-llama/Llama-2-13b-hf@no-such-revision")
    assert isinstance(source, PresetSource)
    assert "published dimensions are taken (llama-2-13b)" in str(source.note)
    assert "; converted" in str(open_to_plan("THUDM/chatglm3-6b").note)


def test_an_unknown_name_is_told_its_neighbours() -> None:
    assert near_presets("lama-2-13b")[0] == "llama-2-13b"
    with pytest.raises(InputError, match=r"presets of a similar name: .*llama-2-13b"):
        open_to_plan("lama-2-13b")
    with pytest.raises(InputError, match="no such file or folder"):
        open_to_plan("./gemma-7b")
    with pytest.raises(InputError) as raised:
        open_to_plan("./nothing-of-the-kind")
    assert "presets" not in str(raised.value)


def test_training_takes_no_preset() -> None:
    with pytest.raises(InputError, match=r"a preset's name: .* e\.g\. meta-llama/Llama-2-13b-hf"):
        find_model("llama-2-13b")


def test_a_real_model_is_known_by_its_dimensions() -> None:
    bundled = preset_like(find_model("bundled").config)
    assert bundled is by_name("smollm2-135m")
    same = preset_config(by_name("qwen2.5-7b"))
    assert preset_like(same, "Qwen/Qwen2.5-7B-Instruct") is by_name("qwen2.5-7b")
    assert preset_like(same, "/models/qwen2-7b-mine") is by_name("qwen2-7b")
    longer = preset_config(by_name("llama-3.1-8b"))
    assert preset_like(longer) is by_name("llama-3.1-8b")
    assert preset_like(preset_config(by_name("llama-3-8b"))) is by_name("llama-3-8b")


def test_the_type_tells_a_family_where_the_dimensions_do_not() -> None:
    assert family_of(tiny_models.config_of("gemma")) == "gemma"
    assert family_of(tiny_models.config_of("llama")) is None
    assert family_of(preset_config(by_name("baichuan2-7b"))) == "baichuan2"
