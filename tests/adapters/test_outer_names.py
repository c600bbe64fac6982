"""Adapters under another model's names: PEFT loads them there, we load them back, damaged ones are not hidden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from fitune.adapters.lora import load_adapter, save_adapter
from fitune.adapters.outer_names import renamed_targets, under_graph_names
from fitune.errors import InputError
from tiny_models import adapted, model_of

BASE = {"reference": "tiny", "identity": "f" * 32}
TOKENS = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))


def outer(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def inner(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1)


class Whole(nn.Module):
    """A model with the decoder one level deeper, as multimodal ones have it."""

    def __init__(self) -> None:
        super().__init__()
        text = model_of("llama")
        self.config = text.config
        self.model = nn.Module()
        self.model.language_model = text.model
        self.lm_head = text.lm_head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model.language_model(input_ids=tokens).last_hidden_state)


@torch.no_grad()
def test_the_whole_model_and_the_decoder_alone_load_it(tmp_path: Path) -> None:
    _, ours = adapted(model_of("llama"))
    assert ours is not None
    save_adapter(ours, tmp_path / "adapter", BASE, outer)
    expected = ours.eval()(input_ids=TOKENS).logits
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(name.startswith("model.language_model.layers.") for name in config["target_modules"])
    settings = config | {"task_type": None}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    whole = PeftModel.from_pretrained(Whole(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(whole(TOKENS), expected, rtol=1e-4, atol=1e-5)
    assert float((Whole().eval()(TOKENS) - expected).abs().max()) > 1e-2
    back = load_adapter(model_of("llama"), tmp_path / "adapter", BASE["identity"], inner=inner).eval()
    torch.testing.assert_close(back(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="does not fit this model"):
        load_adapter(model_of("llama"), tmp_path / "adapter", BASE["identity"])


def test_names_that_fit_already_are_read_where_they_lie(tmp_path: Path) -> None:
    _, ours = adapted(model_of("llama"))
    assert ours is not None
    save_adapter(ours, tmp_path / "adapter", BASE)
    for rename in (None, inner):
        with under_graph_names(tmp_path / "adapter", rename) as place:
            assert place == tmp_path / "adapter"
    save_adapter(ours, tmp_path / "adapter", BASE, outer)
    with under_graph_names(tmp_path / "adapter", inner) as place:
        assert place != tmp_path / "adapter"
    assert not place.exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_told_of_its_own_folder(tmp_path: Path, name: str) -> None:
    _, ours = adapted(model_of("llama"))
    assert ours is not None
    save_adapter(ours, tmp_path / "adapter", BASE, outer)
    file = tmp_path / "adapter" / name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError) as caught:
        load_adapter(model_of("llama"), tmp_path / "adapter", BASE["identity"], inner=inner)
    assert str(tmp_path / "adapter") in str(caught.value)


def test_ranks_of_single_layers_are_renamed_with_them() -> None:
    full = "model.layers.0.self_attn.q_proj"
    config = renamed_targets({"rank_pattern": {full: 8, "k_proj": 4}, "alpha_pattern": {}, "r": 2}, outer)
    assert config["rank_pattern"] == {"model.language_model.layers.0.self_attn.q_proj": 8, "k_proj": 4}
    assert renamed_targets(config, inner)["rank_pattern"] == {full: 8, "k_proj": 4}
