"""Whole decoder layers: which are replaced, that the replaced pass is the one that runs, and what must be caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fitune.data.collation import collate
from fitune.fuse import replace_layers
from fitune.fuse.attention_part import AttentionForm, AttentionPart
from fitune.fuse.decoder_layer import FusedLayer
from fitune.kernels import contract
from fitune.models.build import build_quantised
from fitune.models.find import find_model
from tiny_models import (
    BACKEND,
    FAMILIES,
    adapted,
    distance,
    lora_gradients,
    model_of,
    random_samples,
    write_model,
)


def layers_of(graph: Any) -> list[Any]:
    return [module for module in graph.modules() if isinstance(getattr(module, "forward", None), FusedLayer)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_one_node_and_the_same_numbers(family: str) -> None:
    """The parity with transformers is test_against_transformers'; here: the parts apart against the layer whole."""
    samples = random_samples([25, 30, 9])
    batch = collate([samples], 512, 0)
    model, peft = adapted(model_of(family))
    layers = layers_of(model.graph)
    assert len(layers) == 2
    logprobs, _ = model.logprobs(batch)
    assert "_LayerBackward" in names_of_nodes(logprobs)
    assert not {"_GatedMLPBackward", "_DocumentAttentionBackward", "_LoraLinearBackward"} & names_of_nodes(logprobs)
    logprobs.sum().backward()
    whole = lora_gradients(peft)
    for layer in layers:
        layer.forward = layer.forward.original
    apart, _ = model.logprobs(batch)
    assert "_GatedMLPBackward" in names_of_nodes(apart)
    apart.sum().backward()
    torch.testing.assert_close(logprobs, apart, rtol=1e-5, atol=1e-5)
    for name, expected in lora_gradients(peft).items():
        assert distance(whole[name], expected) < 1e-5, name


def names_of_nodes(result: torch.Tensor) -> set[str]:
    seen: set[Any] = set()
    names, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(type(node).__name__)
        waiting += [following for following, _ in node.next_functions]
    return names


@pytest.mark.parametrize("mutation", ["window", "scale", "cap", "rotary"])
def test_a_wrong_form_is_refused(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, scale: float, window: int, cap: float) -> list[AttentionForm]:
        form = AttentionForm(module.head_dim, scale, window, cap)
        changed = {
            "window": {"window": window + 1},
            "scale": {"scale": scale * 1.01},
            "cap": {"cap": 0.0},
            "rotary": {"rotary": False},
        }[mutation]
        return [AttentionForm(**{**vars(form), **changed})]

    monkeypatch.setattr(replace_layers, "attention_forms", wrong)
    model, _ = adapted(model_of("gemma2"))
    assert "layer" not in model.report.replaced
    assert "differs by" in model.report.left["layer (Gemma2DecoderLayer)"]


def test_wrong_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full for partial rotary, and the angles of the next position."""
    turned = AttentionPart._turned

    def shifted(self: Any, heads: Any, call: Any, inverse: bool = False) -> Any:
        from dataclasses import replace

        return turned(self, heads, replace(call, cos=call.cos.roll(1, 0), sin=call.sin.roll(1, 0)), inverse)

    monkeypatch.setattr(AttentionPart, "_turned", shifted)
    model, _ = adapted(model_of("llama"))
    assert "layer" not in model.report.replaced


def test_what_the_layer_does_not_cover_goes_the_original_way() -> None:
    """A cache, a mask."""
    model, _ = adapted(model_of("llama"))
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.graph(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(model.graph(input_ids=tokens, use_cache=True).logits, expected)
        mask = torch.ones_like(tokens)
        torch.testing.assert_close(model.graph(input_ids=tokens, attention_mask=mask).logits, expected)


def test_a_disabled_adapter_leaves_the_base_in_one_node() -> None:
    batch = collate([random_samples([25])], 512, 0)
    model, peft = adapted(model_of("llama"))
    adapter = model.logprobs(batch)[0]
    with peft.disable_adapter():
        base, _ = model.logprobs(batch)
        for layer in layers_of(model.graph):
            layer.forward = layer.forward.original
        expected, _ = model.logprobs(batch)
    torch.testing.assert_close(base, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, adapter, rtol=1e-3)


@pytest.mark.parametrize("wrong", ["leak", "window"])
def test_a_mixture_whose_documents_are_not_apart_is_not_packed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts change on a rounding, so the proof looks at the usual token; a wrong mask must still be seen."""
    family = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model, _ = adapted(model_of("mixtral", **family), torch.bfloat16)
    assert "attention" in model.report.replaced
    attend = contract.attention

    def changed(q: Any, k: Any, v: Any, documents: torch.Tensor, window: int, *rest: Any) -> Any:
        if wrong == "window":
            return attend(q, k, v, documents, 8, *rest)
        whole = torch.tensor([[0, 0, q.shape[1], 0, 0]], dtype=torch.int32)
        return attend(q, k, v, whole, window, *rest)

    monkeypatch.setattr(contract, "attention", changed)
    model, _ = adapted(model_of("mixtral", **family), torch.bfloat16)
    assert "attention" not in model.report.replaced


def test_a_candidate_that_goes_the_original_way_proves_nothing() -> None:
    """Its rotary embedding turns neighbours, not halves, and its layers are asked for no router logits (False)."""
    sizes = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1}
    model, _ = adapted(model_of("ernie4_5_moe", **sizes))
    assert "mlp" in model.report.replaced
    assert "layer" not in model.report.replaced
    assert "differs by" in model.report.left["layer (Ernie4_5_MoeDecoderLayer)"]


def test_layers_alike_are_proven_once_in_four_bits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer's quantised weights hold does not make it another kind."""
    folder = write_model(tmp_path / "model", num_hidden_layers=4)
    choose, chosen = replace_layers._choose, []

    def counted(*arguments: Any) -> Any:
        chosen.append(arguments[0])
        return choose(*arguments)

    monkeypatch.setattr(replace_layers, "_choose", counted)
    model, _ = adapted(build_quantised(find_model(str(folder)), torch.float32, BACKEND))
    offsets = {layer.self_attn.q_proj.base_layer.weight.offset for layer in layers_of(model.graph)}
    assert len(offsets) == model.report.replaced["layer"] == 4
    assert len(chosen) == 1


@pytest.mark.parametrize("second", [0.0, 1.0])
def test_a_layer_unlike_its_likes_is_seen_in_the_whole_model(second: float) -> None:
    """Both layers are alike in what can be compared of them; only the first is proven."""

    class Odd(LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, **keywords: Any) -> torch.Tensor:
            return super().forward(hidden_states, **keywords) + self.told["added"]

    graph = model_of("llama")
    for layer, added in zip(graph.model.layers, (0.0, second), strict=True):
        layer.__class__ = Odd
        layer.told = {"added": added}
    model, _ = adapted(graph)
    if second == 0.0:
        assert model.report.replaced["layer"] == 2
    else:
        assert "layer" not in model.report.replaced
        assert "output differs by" in model.report.left["layer (all)"]
        assert layers_of(model.graph) == []
