"""DoRA against PEFT's own: outputs, every gradient, dropout, 4-bit and 16-bit bases; no way leaves magnitudes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fitune.adapters.lora import adapter_digest, inject, load_adapter, save_adapter
from fitune.data.collation import collate
from fitune.errors import InputError
from fitune.fuse.adapter_layers import fused_lora_layer
from fitune.fuse.dora_linear import FusedDoraLinear
from fitune.fuse.int8_calibration import calibrate
from fitune.fuse.model import prepare
from fitune.generate import generate
from fitune.models.folder import FolderSource
from fitune.models.graph import head_name
from fitune.plan.computation import Computation
from fitune.quant.linear import QuantisedLinear
from fitune.quant.nf4 import quantise
from fitune.train.prepare import build_for_answers
from tiny_models import BACKEND, distance, lora_gradients, model_of, random_samples, write_model

TOKENS = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
BASE = {"reference": "tiny", "identity": "f" * 32}
NATIVE = Computation(torch.bfloat16, BACKEND, 1, "a test")


def dora(graph: Any, fused: bool = True, dropout: float = 0.0, **settings: Any) -> Any:
    """With B and magnitudes that are trained, each by its name."""
    arguments = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "rslora": False, **settings}
    layer = fused_lora_layer if fused else None
    model = inject(graph, head_name(graph), seed=1, base_name="tiny", layer=layer, dora=True, dropout=dropout,
                   **arguments)  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if "lora_magnitude" in name:
                parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
    return model.train()


def passed(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=TOKENS).logits
    logits.float().square().mean().backward()
    return logits.detach(), lora_gradients(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def quantised(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model with its linear layers in NF4, and one of those very weights, dense."""
    four, dense = model_of(family, dtype), model_of(family, dtype)
    for name, module in list(four.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = quantise(module.weight.data, BACKEND)
            parent, _, leaf = name.rpartition(".")
            bias = None if module.bias is None else module.bias.data
            setattr(four.get_submodule(parent), leaf, QuantisedLinear(weight, bias, BACKEND, dtype))
            dense.get_submodule(name).weight.data = weight.dense(dtype, BACKEND)
    return four.requires_grad_(False), dense


@pytest.mark.parametrize("in_four_bits", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_pefts(in_four_bits: bool, dropout: float) -> None:
    """qwen2 has biases on its queries, keys and values, which no magnitude scales."""
    mine, reference = quantised("qwen2") if in_four_bits else (model_of("qwen2"), model_of("qwen2"))
    ours, theirs = dora(mine, dropout=dropout), dora(reference, fused=False, dropout=dropout)
    assert sum(isinstance(module, FusedDoraLinear) for module in ours.modules()) == 14
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(passed(model))
    assert distance(found[0][0], found[1][0]) < 1e-5
    assert found[0][1].keys() == found[1][1].keys()
    assert len(found[0][1]) == 3 * 14
    for name, gradient in found[1][1].items():
        assert distance(found[0][1][name], gradient) < 1e-4, name
    assert distance(logits(ours), logits(theirs)) < 1e-5


def test_fused_models_equal_pefts() -> None:
    """Through all that takes parts' places: norms and attention by documents, and MLPs that no magnitude is in."""
    for targets, mlps in (("all-linear", 0), ("attention", 2)):
        graph = model_of("llama")
        model = prepare(graph, dora(graph, targets=targets), torch.float32, BACKEND)
        assert model.report.replaced["mlp"] == mlps
        assert model.report.replaced["layer"] == 0
        assert "adapters do more than LoRA" in str(model.report.left) or mlps == 0
        theirs = dora(model_of("llama"), fused=False, targets=targets)
        assert distance(logits(model.graph), logits(theirs)) < 1e-5


def test_without_effect_at_the_start_and_off() -> None:
    graph = model_of("qwen2")
    plain = logits(model_of("qwen2"))
    fresh = inject(graph, head_name(graph), rank=4, alpha=8.0, dropout=0.0, targets="all-linear", rslora=False,
                   seed=1, base_name="tiny", layer=fused_lora_layer, dora=True)  # fmt: skip
    assert distance(logits(fresh), plain) < 1e-6
    trained = dora(model_of("qwen2"))
    assert distance(logits(trained), plain) > 0.1
    with trained.disable_adapter():
        assert torch.equal(logits(trained), plain)
    assert distance(logits(trained), plain) > 0.1


def test_scales_are_not_rounded() -> None:
    """In bfloat16 1.01 is 1.0078; on average over the tokens the outputs must grow by just 1.01."""
    graph = model_of("llama", torch.bfloat16)
    model = inject(graph, head_name(graph), rank=2, alpha=2.0, dropout=0.0, targets=["q_proj"], rslora=False, seed=1,
                   base_name="tiny", layer=fused_lora_layer, dora=True)  # fmt: skip
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.01)
        base, ours = layer.get_base_layer()(x).float(), layer(x).float()
    assert float((ours * base).sum() / base.square().sum()) == pytest.approx(1.01, abs=5e-4)


def test_what_generation_keeps_follows_the_parameters() -> None:
    model = dora(model_of("llama"))
    before = logits(model)
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(2)
    assert distance(logits(model), before) > 0.1
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data.numpy()[:] /= 2  # behind torch's back, as native optimizers write
    assert distance(logits(model.train()), before) < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_generated_tokens_are_pefts(family: str) -> None:
    """Rows of unequal lengths, a cache, one new token at a time."""
    graph = model_of(family)
    prepare(graph, dora(graph), torch.float32, BACKEND)
    theirs = dora(model_of(family), fused=False).eval()
    prompts = [TOKENS[0, :7].tolist(), TOKENS[1, :12].tolist(), TOKENS[0, 5:9].tolist()]
    found = generate(graph.eval(), prompts, max_new_tokens=8, eos_ids=[256], pad_id=257)
    for prompt, answer in zip(prompts, found, strict=True):
        expected = theirs.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=256, pad_token_id=257
        )[0, len(prompt) :].tolist()
        assert list(answer) == [token for token in expected if token != 256]


def test_a_zero_row_stays_zero() -> None:
    graph = model_of("llama")
    graph.model.layers[0].mlp.up_proj.weight.data[3] = 0
    model = inject(graph, head_name(graph), rank=2, alpha=2.0, dropout=0.0, targets="mlp", rslora=False, seed=1,
                   base_name="tiny", layer=fused_lora_layer, dora=True)  # fmt: skip
    found, gradients = passed(model.train())
    assert bool(torch.isfinite(found).all())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


@pytest.mark.parametrize("way", ["saved by us", "saved by PEFT"])
def test_peft_and_we_read_each_others(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "adapter"
    written = dora(model_of("llama"), fused=way == "saved by us", rslora=True)
    if way == "saved by us":
        save_adapter(written, folder, BASE)
    else:
        written.save_pretrained(folder)
    ours = load_adapter(model_of("llama"), folder, BASE["identity"], fused_lora_layer)
    theirs = PeftModel.from_pretrained(model_of("llama"), str(folder))
    assert not any(isinstance(module, FusedDoraLinear) for module in theirs.modules())
    assert adapter_digest(ours) == adapter_digest(theirs) == adapter_digest(written)
    assert distance(logits(ours), logits(theirs)) < 1e-5
    assert distance(logits(ours), logits(written)) < 1e-5


def test_an_adapter_whose_a_began_otherwise_is_fused_too(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights="gaussian")
    written = get_peft_model(model_of("llama"), config)
    written.save_pretrained(tmp_path)
    four, dense = quantised("llama")
    ours = load_adapter(four, tmp_path, "any", fused_lora_layer)
    assert sum(isinstance(module, FusedDoraLinear) for module in ours.modules()) == 2
    assert distance(logits(ours), logits(PeftModel.from_pretrained(dense, str(tmp_path)))) < 1e-5


def test_computing_layers_again_gives_the_same_bits() -> None:
    batch = collate([random_samples([70, 40])], 256, 0)
    found = []
    for again in (False, True):
        graph = model_of("llama")
        model = prepare(graph, dora(graph), torch.float32, BACKEND)
        if again:
            model.recompute_layers()
        graph.train()
        logprobs, weights = model.logprobs(batch)
        (logprobs * weights).sum().backward()
        found.append((logprobs.detach(), lora_gradients(graph)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[1][1][name], value) for name, value in found[0][1].items())


def test_in_integers() -> None:
    """Near what bfloat16 gives; the lengths are of the weights themselves."""
    batch = collate([random_samples([70, 40])], 512, 0)
    found = []
    for in_integers in (False, True):
        graph = model_of("llama", torch.bfloat16, hidden_size=192, intermediate_size=320)
        model = prepare(graph, dora(graph), torch.bfloat16, BACKEND)
        graph.train()
        if in_integers:
            calibrate(model, [batch])
            assert model.report.replaced["int8"] == 14
        logprobs, _ = model.logprobs(batch)
        logprobs.sum().backward()
        found.append((logprobs.detach(), lora_gradients(graph)))
    assert 0 < distance(found[1][0], found[0][0]) < 0.05
    for name, gradient in found[0][1].items():
        assert distance(found[1][1][name], gradient) < 0.2, name


def test_layers_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    source = FolderSource(write_model(tmp_path / "model", num_hidden_layers=4))
    written = dora(model_of("llama", num_hidden_layers=4))
    save_adapter(written, tmp_path / "adapter", BASE | {"identity": source.identity()})
    held, streamed, bare = (
        build_for_answers(source, "qlora", NATIVE, adapter, resident)
        for adapter, resident in ((tmp_path / "adapter", None), (tmp_path / "adapter", 1), (None, None))
    )
    assert streamed.stream is not None
    with torch.no_grad():
        one, other, plain = (
            model.graph(input_ids=TOKENS, use_cache=False).logits for model in (held, streamed, bare)
        )
    assert torch.equal(one, other)
    assert distance(one, plain) > 0.1


def test_transposed_linears_are_refused() -> None:
    graph = model_of("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(InputError, match="keep their weights transposed"):
        dora(graph)
    assert not any(isinstance(module, PeftLinear) for module in graph.modules())
