"""What full fine-tuning writes: an ordinary checkpoint, of a multimodal model the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from fitune.fuse.model import FusedModel, prepare
from fitune.models import find_model
from fitune.models.build import build_dense
from fitune.models.source import ModelSource
from fitune.models.text_part import TextPart
from fitune.train.weights import save_weights
from tiny_models import BACKEND, SHAPE, tokenizer, write_model

TOKENS = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(3))


def trained(source: ModelSource) -> FusedModel:
    """The model with every weight moved a little, as training would."""
    graph = build_dense(source, torch.float32, trainable=True)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return prepare(graph, None, torch.float32, BACKEND)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_text_model_loads_in_transformers(tmp_path: Path, kind: str) -> None:
    source = find_model(str(write_model(tmp_path / "base", kind)))
    model = trained(source)
    save_weights(model, source, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    expected = {name: value.bfloat16().float() for name, value in model.graph.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer().chat_template


@pytest.mark.parametrize("tied", [True, False])
def test_a_multimodal_model_stays_whole(tmp_path: Path, tied: bool) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    text = {**SHAPE, "head_dim": 16, "tie_word_embeddings": tied}
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=300,
        boi_token_index=301, eoi_token_index=302, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(base)
    tokenizer().save_pretrained(base)
    (base / "preprocessor_config.json").write_text('{"size": 28}')
    source = find_model(str(base))
    assert isinstance(source, TextPart)
    model = trained(source)
    save_weights(model, source, out)
    before, found = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(found) == set(before)
    assert all(torch.equal(found[name], before[name]) for name in source.carried_names())
    assert all(found[source.written_name(name)].dtype == torch.bfloat16 for name in source.tensor_names())
    whole, info = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    again = find_model(str(out))
    assert isinstance(again, TextPart)
    assert again.config.dtype == torch.bfloat16
    assert distance(logits(whole), logits(model.graph)) < 0.02
    assert distance(logits(whole), logits(build_dense(source, torch.float32, trainable=False))) > 0.05
    assert (out / "preprocessor_config.json").is_file()
