"""Modules trained whole beside an adapter are what PEFT makes of `modules_to_save`, tied embeddings included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from fitune.adapters.lora import adapter_digest, inject, load_adapter, save_adapter
from fitune.data.collation import collate
from fitune.errors import InputError
from fitune.fuse.adapter_layers import fused_lora_layer
from fitune.fuse.model import prepare
from fitune.generate import generate
from fitune.models.graph import head_name, set_quantised
from fitune.quant.nf4 import quantise
from tiny_models import BACKEND, adapted, distance, model_of, random_samples

BASE = {"reference": "tiny", "identity": "f" * 32}
ENDS = ("embed_tokens", "lm_head")
TOKENS = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
SAVED = ".modules_to_save.default"


def peft_model(family: str, names: tuple[str, ...], tied: bool, **settings: Any) -> PeftModel:
    """PEFT's own, with the values of `ours`."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=settings.pop("targets", ["q_proj", "down_proj"]), task_type="CAUSAL_LM",
        modules_to_save=list(names), ensure_weight_tying=tied,
    )  # fmt: skip
    return get_peft_model(model_of(family, **settings), config)


def ours_of(family: str, names: tuple[str, ...], targets: Any = ("q_proj", "down_proj"), **more: Any) -> Any:
    fused, peft = adapted(model_of(family, more.pop("dtype", torch.float32)), targets=targets, whole=names, **more)
    moved(peft)
    return fused, peft


@torch.no_grad()
def moved(model: PeftModel) -> None:
    """The copies are not the originals any more."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if SAVED in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


@torch.no_grad()
def give_values(source: PeftModel, target: PeftModel) -> None:
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(values[name])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ENDS),
        ("llama", ("embed_tokens",)),
        ("llama", ("lm_head", "norm")),
        ("qwen2", ENDS),  # tied
        ("gemma", ("lm_head",)),  # tied; embeddings of a class of their own, an added 1 in the norm
        ("llama", ("input_layernorm", "gate_proj", "o_proj")),
        ("granite", ENDS),
        ("qwen2", ("q_proj",)),  # with a bias
    ],
)
def test_logprobs_and_gradients_are_pefts(family: str, names: tuple[str, ...]) -> None:
    targets = ("k_proj", "down_proj")
    fused, ours = ours_of(family, names, targets)
    assert fused.report.replaced["head"] == 1
    tied = bool(fused.graph.config.tie_word_embeddings) and bool(set(ENDS) & set(names))
    full = tuple(ours.peft_config["default"].modules_to_save)
    assert ours.peft_config["default"].ensure_weight_tying is tied
    theirs = peft_model(family, full, tied, targets=list(targets))
    give_values(ours, theirs)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    batch = collate([random_samples([24])], 24, 0)
    values, weights = fused.logprobs(batch)
    (-(values * weights).sum() / weights.sum()).backward()
    out = theirs.train()(input_ids=batch.tokens, use_cache=False).logits[0].float().log_softmax(-1)
    rows = batch.weights.reshape(-1).nonzero().squeeze(1)
    expected = out[rows - 1].gather(1, batch.tokens.reshape(-1)[rows].unsqueeze(1)).squeeze(1)
    (-(expected * weights).sum() / weights.sum()).backward()
    assert distance(values.detach(), expected.detach()) < 1e-4
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    assert any(SAVED in name for name in found)
    for name in wanted:
        assert distance(found[name], wanted[name]) < 2e-4, name


@pytest.mark.parametrize(("family", "names"), [("llama", (*ENDS, "norm")), ("qwen2", ENDS), ("gemma", ENDS)])
def test_a_folder_of_ours_is_pefts_and_comes_back(family: str, names: tuple[str, ...], tmp_path: Path) -> None:
    fused, ours = ours_of(family, names)
    save_adapter(ours, tmp_path / "adapter", BASE)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} < written.keys()
    theirs = PeftModel.from_pretrained(model_of(family), str(tmp_path / "adapter"))
    assert distance(logits(fused.graph), logits(theirs)) < 1e-4
    assert distance(logits(fused.graph), logits(model_of(family))) > 0.01
    for trainable in (False, True):
        back = load_adapter(model_of(family), tmp_path / "adapter", BASE["identity"], fused_lora_layer, trainable)
        assert adapter_digest(back) == adapter_digest(ours)
        assert {n for n, p in back.named_parameters() if p.requires_grad} == (
            {n for n, p in ours.named_parameters() if p.requires_grad} if trainable else set()
        )
        opened = prepare(back.get_base_model(), back, torch.float32, BACKEND)
        assert opened.report.replaced["head"] == 1
        assert distance(logits(opened.graph), logits(fused.graph)) < 1e-4
        with back.disable_adapter():
            assert distance(logits(opened.graph), logits(model_of(family))) < 1e-4


def test_what_peft_made_is_opened(tmp_path: Path) -> None:
    """Its two of what the model has as one, too: so it computes."""
    for family, tied in (("llama", False), ("qwen2", False), ("qwen2", True)):
        theirs = peft_model(family, ENDS, tied)
        moved(theirs)
        theirs.save_pretrained(tmp_path / "adapter")
        back = load_adapter(model_of(family), tmp_path / "adapter", "any", fused_lora_layer)
        assert distance(logits(back), logits(theirs)) < 1e-5


def test_float32_copies_of_a_16_bit_model_are_computed_in_16(tmp_path: Path) -> None:
    fused, ours = ours_of("llama", (*ENDS, "norm"), dtype=torch.bfloat16)
    copies = {n: p for n, p in ours.named_parameters() if SAVED in n}
    assert {p.dtype for p in copies.values()} == {torch.float32}
    assert fused.graph.get_input_embeddings()(TOKENS).dtype == torch.bfloat16
    narrow = prepare(ours.get_base_model(), ours, torch.bfloat16, BACKEND)
    assert narrow.report.replaced["head"] == 1
    assert not any("norm" in part for part in narrow.report.left)
    batch = collate([random_samples([24])], 24, 0)
    values, _ = narrow.logprobs(batch)
    values.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in copies.values())
    wide = peft_model("llama", tuple(ours.peft_config["default"].modules_to_save), False)
    give_values(ours, wide)
    rows = batch.weights.reshape(-1).nonzero().squeeze(1)
    out = wide(input_ids=batch.tokens, use_cache=False).logits[0].log_softmax(-1)
    expected = out[rows - 1].gather(1, batch.tokens.reshape(-1)[rows].unsqueeze(1)).squeeze(1)
    assert distance(values.detach(), expected.detach()) < 0.03
    expected.sum().backward()
    for name, parameter in wide.named_parameters():
        if SAVED in name:
            assert distance(copies[name].grad, parameter.grad) < 0.05, name


@pytest.mark.parametrize(
    ("names", "targets", "told"),
    [
        (("embed_token",), "all-linear", r"matches no module with weights; did you mean embed_tokens\?"),
        (("mlp",), "all-linear", "'mlp' has modules inside"),
        (("q_proj",), ("q_proj", "k_proj"), "such as model.layers.0.self_attn.q_proj, are named for the adapter"),
    ],
)
def test_what_cannot_be_is_refused(names: tuple[str, ...], targets: Any, told: str) -> None:
    with pytest.raises(InputError, match=told) as refused:
        ours_of("llama", names, targets)
    assert refused.value.where == "lora.modules_to_save"


def test_the_adapter_is_not_on_what_is_trained_whole() -> None:
    _, ours = ours_of("llama", ("q_proj",), "all-linear")
    targets = ours.peft_config["default"].target_modules
    assert len(targets) == 12
    assert not any(name.endswith("q_proj") for name in targets)


def test_four_bits_are_not_trained(tmp_path: Path) -> None:
    def four() -> Any:
        model = model_of("llama").requires_grad_(False)
        name = "model.layers.0.self_attn.q_proj.weight"
        set_quantised(model, name, quantise(model.get_parameter(name).data, BACKEND), torch.float32, BACKEND)
        return model

    model = four()
    with pytest.raises(InputError, match="q_proj is in 4 bits, and cannot be trained whole: take method lora"):
        inject(model, head_name(model), rank=2, alpha=4, dropout=0, targets=("k_proj",), rslora=False, seed=0,
               base_name="", whole=("q_proj",))  # fmt: skip
    theirs = peft_model("llama", ("q_proj",), False, targets=["k_proj"])
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="q_proj, that are in 4 bits here; load the base in 16 bits"):
        load_adapter(four(), tmp_path / "adapter", "any")


def test_weights_that_layers_share_are_not_trained_apart() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj shares its weights with model.layers.1.mlp.up_proj"):
        inject(model, head_name(model), rank=2, alpha=4, dropout=0, targets=("k_proj",), rslora=False, seed=0,
               base_name="", whole=("layers.0.mlp.up_proj",))  # fmt: skip


def test_names_in_the_configuration_fit_nothing_else(tmp_path: Path) -> None:
    """PEFT takes every name that ends so: `norm` would be all norms."""
    _, ours = ours_of("llama", ("norm",))
    save_adapter(ours, tmp_path / "adapter", BASE)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm"]
    theirs = PeftModel.from_pretrained(model_of("llama"), str(tmp_path / "adapter"))
    assert (
        sum(hasattr(module, "modules_to_save") and hasattr(module, "original_module") for module in theirs.modules())
        == 1
    )


@pytest.mark.parametrize(("family", "names"), [("llama", (*ENDS, "input_layernorm")), ("gemma", ENDS)])
def test_generated_tokens_are_pefts(family: str, names: tuple[str, ...]) -> None:
    fused, ours = ours_of(family, names)
    saved = tuple(ours.peft_config["default"].modules_to_save)
    theirs = peft_model(family, saved, family == "gemma")
    give_values(ours, theirs)
    prompts = [TOKENS[0, :7].tolist(), TOKENS[0, 5:17].tolist()]
    found = generate(fused.graph.eval(), prompts, max_new_tokens=8, eos_ids=[256], pad_id=257)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = theirs.eval().generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
            eos_token_id=256, pad_token_id=257,
        )  # fmt: skip
        assert answer == expected[0, len(prompt) :].tolist()
