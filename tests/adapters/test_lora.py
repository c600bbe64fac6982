"""Adapters: PEFT loads what we save and we load what PEFT saves; what does not belong is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fitune.adapters.lora import BASE_FILE, adapter_digest, inject, load_adapter, read_base, save_adapter
from fitune.adapters.targets import target_names
from fitune.errors import InputError
from fitune.fuse.adapter_layers import fused_lora_layer
from fitune.fuse.lora_linear import FusedLoraLinear
from fitune.models.graph import head_name
from tiny_models import adapted, model_of

BASE = {"reference": "tiny", "identity": "f" * 32}
TOKENS = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_we_save(tmp_path: Path, rslora: bool) -> None:
    _, ours = adapted(model_of("llama"), rslora=rslora)
    save_adapter(ours, tmp_path / "adapter", BASE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    theirs = PeftModel.from_pretrained(model_of("llama"), str(tmp_path / "adapter"))
    assert not any(isinstance(module, FusedLoraLinear) for module in theirs.modules())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert read_base(tmp_path / "adapter") == BASE
    assert adapter_digest(ours) == adapter_digest(theirs)


def test_we_load_what_peft_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = get_peft_model(
        model_of("llama"),
        LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    assert read_base(tmp_path / "adapter") is None
    ours = load_adapter(model_of("llama"), tmp_path / "adapter", "any", fused_lora_layer)
    assert sum(isinstance(module, FusedLoraLinear) for module in ours.modules()) == 4
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_ours_come_back_to_the_bit_and_replace_what_was_there(tmp_path: Path) -> None:
    _, ours = adapted(model_of("llama"))
    _, other = adapted(model_of("llama"), rank=2)
    save_adapter(other, tmp_path / "adapter", BASE)
    save_adapter(ours, tmp_path / "adapter", BASE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    back = load_adapter(model_of("llama"), tmp_path / "adapter", BASE["identity"], fused_lora_layer, trainable=True)
    assert adapter_digest(back) == adapter_digest(ours) != adapter_digest(other)
    assert any(parameter.requires_grad for parameter in back.parameters())


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, ours = adapted(model_of("llama"))
    save_adapter(ours, tmp_path / "adapter", BASE)
    with pytest.raises(InputError, match=r"was trained on 'tiny'.*not on the model given"):
        load_adapter(model_of("llama"), tmp_path / "adapter", "0" * 32)
    with pytest.raises(InputError, match=r"does not fit this model"):
        load_adapter(model_of("llama", hidden_size=32), tmp_path / "adapter", BASE["identity"])


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config.json and adapter_model.safetensors missing"):
        load_adapter(model_of("llama"), tmp_path, "any")
    _, ours = adapted(model_of("llama"))
    folder = tmp_path / "adapter"
    save_adapter(ours, folder, BASE)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-50])
    with pytest.raises(InputError, match=r"does not fit this model"):
        load_adapter(model_of("llama"), folder, BASE["identity"])
    weights.write_bytes(whole)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = [name for name in config["target_modules"] if "layers.1" not in name]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"tensors of the adapter and the model do not match"):
        load_adapter(model_of("llama"), folder, BASE["identity"])
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"not a LoRA adapter that PEFT reads"):
        load_adapter(model_of("llama"), folder, BASE["identity"])
    assert (folder / BASE_FILE).is_file()


def test_a_seed_gives_the_same_adapter_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    digests = [adapter_digest(adapted(model_of("llama"))[1]) for _ in range(2)]
    assert digests[0] == digests[1]
    graph = model_of("llama")
    state = torch.get_rng_state()
    inject(graph, head_name(graph), rank=2, alpha=4.0, dropout=0.0, targets=["q_proj"], rslora=False, seed=3,
           base_name="tiny")  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)


def test_targets() -> None:
    graph = model_of("llama")
    every = target_names(graph, "lm_head", "all-linear")
    assert len(every) == 14
    assert "lm_head" not in every
    assert target_names(graph, "lm_head", ["q_proj"]) == [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    assert target_names(graph, "lm_head", ["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(InputError) as caught:
        target_names(graph, "lm_head", ["q_porj", "v_proj", "nothing_like_it"])
    text = str(caught.value)
    assert "2 problems" in text
    assert "did you mean q_proj?" in text
    assert "there are: down_proj, gate_proj" in text
