"""Tiny multimodal models; the reference is the whole model's own logits on text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from fitune.errors import InputError
from fitune.models import find_model
from fitune.models.folder import FolderSource
from fitune.models.text_part import TextPart, text_part
from fitune.quant.nf4 import quantise
from tiny_models import BACKEND, SHAPE, tokenizer

TEXT = {key: value for key, value in SHAPE.items() if key != "tie_word_embeddings"}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 2, "intermediate_size": 64}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
# Model type -> settings of the whole, what the text's configuration is built from, what the pictures' is.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302},
        {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        VISION,
    ),
    "llava": ({"image_token_index": 300}, {"model_type": "llama"}, {"model_type": "clip_vision_model", **VISION}),
    "mistral3": (
        {"image_token_index": 300, "spatial_merge_size": 1},
        {"model_type": "mistral", "head_dim": 16},
        {"model_type": "pixtral", **VISION, "head_dim": 16},
    ),
    "smolvlm": ({"image_token_id": 300}, {"model_type": "llama"}, VISION),
    "llama4": (
        {},
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 128, "attention_chunk_size": 64},
        {**VISION, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
    ),
    "qwen2_vl": ({"image_token_id": 300, "video_token_id": 301}, {"rope_parameters": MROPE}, QWEN_VISION),
    "qwen2_5_vl": (
        {"image_token_id": 300, "video_token_id": 301},
        {"rope_parameters": MROPE},
        {**QWEN_VISION, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": (
        {"image_token_id": 300, "video_token_id": 301},
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 16},
        {**QWEN_VISION, "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
}


def whole_model(kind: str, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    settings, text, vision = copy.deepcopy(KINDS[kind])
    config = AutoConfig.for_model(
        kind, text_config={**TEXT, "tie_word_embeddings": tied, **text}, vision_config=vision,
        tie_word_embeddings=tied, **settings,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def text_model(source: Any) -> PreTrainedModel:
    """The graph of the source's configuration with the source's tensors under their own names."""
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(
        {name: source.read(name) for name in source.tensor_names()}, strict=False
    )
    assert unexpected == []
    assert set(missing) <= set(model._tied_weights_keys or ())
    assert not missing or source.config.tie_word_embeddings
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_decoder_computes_what_the_whole_model_does(tmp_path: Path, kind: str, tied: bool) -> None:
    whole = whole_model(kind, tied)
    whole.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    assert isinstance(source, TextPart)
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
        found = text_model(source)(input_ids=tokens).logits
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert source.config.tie_word_embeddings is tied
    assert source.note is not None
    assert f"the text decoder of {kind}; {len(source.carried_names())} other tensors" in source.note
    names = FolderSource(tmp_path).tensor_names()
    written = [source.written_name(name) for name in source.tensor_names()]
    assert sorted([*written, *source.carried_names()]) == sorted(names)
    assert source.carried_names()
    assert not any("visual" in name or "vision" in name for name in source.tensor_names())
    loaded = AutoModelForCausalLM if type(whole.config) in MODEL_FOR_CAUSAL_LM_MAPPING else type(whole)
    modules = dict(loaded.from_pretrained(tmp_path).named_modules())
    for name, _ in text_model(source).model.named_modules(prefix="model"):
        assert source.outer_module(name) in modules or name == "model"
        assert source.graph_module(source.outer_module(name)) == name
    assert source.outer_module("lm_head") == source.graph_module("lm_head") == "lm_head"
    assert source.warnings() == []


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
def test_the_graphs_own_names_are_read_too(tmp_path: Path, kind: str) -> None:
    """Checkpoints written by others than transformers carry `model.language_model.`."""
    whole = whole_model(kind)
    whole.save_pretrained(tmp_path)
    first = text_part(FolderSource(tmp_path))
    expected = {name: first.read(name).clone() for name in first.tensor_names()}
    save_file(
        {name: value.contiguous() for name, value in whole.state_dict().items()}, tmp_path / "model.safetensors"
    )
    assert any(name.startswith("model.language_model.") for name in FolderSource(tmp_path).tensor_names())
    second = text_part(FolderSource(tmp_path))
    assert set(second.tensor_names()) == set(expected)
    assert all(torch.equal(second.read(name), value) for name, value in expected.items())


def test_carried_tensors_and_companions_are_the_files_own(tmp_path: Path) -> None:
    whole_model("gemma3").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"size": 28}')
    folder = FolderSource(tmp_path / "m")
    source = text_part(folder)
    for name in source.carried_names():
        assert torch.equal(source.read(name), folder.read(name))
        assert source.written_name(name) == name
    target = tmp_path / "copy"
    target.mkdir()
    source.write_companions(target)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    assert source.fingerprint() != folder.fingerprint()
    assert source.config.dtype == torch.bfloat16
    assert source.tokenizer()("hi")["input_ids"] == folder.tokenizer()("hi")["input_ids"]


def test_a_whole_that_cannot_be_built_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_model("gemma3").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    source = text_part(FolderSource(tmp_path))
    source.whole.config.vision_config.hidden_act = "unheard of"
    assert source.outer_module("model.layers.0") == "model.layers.0"
    (warning,) = source.warnings()
    assert "whole gemma3 cannot be built here" in warning


def test_nf4_weights_of_the_decoder_are_used_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole_model("gemma3").to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, device_map="cpu", quantization_config=settings
    )
    model.save_pretrained(tmp_path / "quantised")
    plain, quantised = (text_part(FolderSource(tmp_path / name)) for name in ("plain", "quantised"))
    assert set(plain.tensor_names()) == set(quantised.tensor_names())
    linears = [name for name in plain.tensor_names() if name.endswith("proj.weight")]
    for name in linears:
        weight = quantised.nf4(name)
        assert weight is not None
        assert torch.equal(weight.codes, quantise(plain.read(name), BACKEND).codes)
        assert quantised.shape(name) == plain.shape(name)
    assert quantised.nf4("model.norm.weight") is None
    assert quantised.quantised_folder() is None
    assert {name: quantised.shape(name) for name in quantised.carried_names()} == {
        name: plain.shape(name) for name in plain.carried_names()
    }


def test_a_text_model_is_left_as_it_is(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gemma3_text", **SHAPE, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = FolderSource(tmp_path)
    assert text_part(source) is source
    assert source.carried_names() == []
    assert source.written_name("x") == "x"


def test_a_multimodal_model_without_a_text_model_of_its_own_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("glm4v").save_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"glm4v is multimodal, .* for its text decoder alone \(glm4v_text\)"):
        FolderSource(tmp_path)


def test_a_checkpoint_without_the_decoder_is_refused(tmp_path: Path) -> None:
    whole = whole_model("gemma3")
    whole.save_pretrained(tmp_path)
    tower = {f"vision_tower.{name}": value for name, value in whole.model.vision_tower.state_dict().items()}
    save_file(tower, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="none of its tensors is of a text decoder"):
        text_part(FolderSource(tmp_path))
