"""Replacing whole decoder layers, each accepted by proof on the very call that the model makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fitune.fuse.attention import seen_calls
from fitune.fuse.attention_part import attention_forms
from fitune.fuse.decoder_layer import FusedLayer, Positions, fused_layer_candidates
from fitune.fuse.lora_linear import covered_all
from fitune.fuse.prove import prove, with_trained_adapter
from fitune.models.dropout import drops
from fitune.quant.parameter import QuantisedParameter


@dataclass
class LayerCalls:
    """What a pass through the model asked of its decoder layers.

    Attributes:
        keywords: of each layer's call, by its id.
        attention: scale, window and cap that each attention module asked for, by its id.
        tokens: in the row.
    """

    keywords: dict[int, dict[str, Any]] = field(default_factory=dict)
    attention: dict[int, tuple[float, int, float]] = field(default_factory=dict)
    tokens: int = 0


def replace_layers(
    model: PreTrainedModel, dtype: torch.dtype, backend: str, calls: LayerCalls | None
) -> tuple[int, dict[str, str]]:
    """Replaces the decoder layers of `model` that it can; how many, and class -> why not for the others.

    `calls`: of two documents in one row (`layer_calls`). None: every layer is accepted by structure alone, for dry
    runs.
    """
    proofs = calls is not None
    calls = calls or LayerCalls()
    positions = Positions()
    proven: dict[tuple[object, ...], int | None] = {}
    count = 0
    left: dict[str, list[str]] = {}
    for layer in _layers(model):
        call = calls.keywords.get(id(layer))
        scale, window, cap = calls.attention.get(id(layer.self_attn), (None, 0, 0.0))
        candidates = fused_layer_candidates(
            layer, attention_forms(layer.self_attn, scale, window, cap), positions, backend
        )
        kind = type(layer).__name__
        if not candidates:
            _note(left, kind, "its parts are not an attention and a gated MLP between RMSNorms, all replaced")
            continue
        if drops(layer):
            _note(left, kind, "it has dropout")
            continue
        if covered_all(candidates[0].linears) is None:
            _note(
                left,
                kind,
                "its projections are trained themselves, or their adapters do more than LoRA without dropout",
            )
            continue
        if not proofs:
            layer.forward = candidates[0]
            count += 1
            continue
        if call is None or scale is None:
            _note(left, kind, "it is not called with a hidden state and keywords alone")
            continue
        signature = (kind, scale, window, cap, _shape_of(call), *_insides(layer))
        if signature not in proven:
            proven[signature], reason = _choose(layer, candidates, call, dtype, calls.tokens)
            if proven[signature] is None:
                _note(left, kind, reason)
        chosen = proven[signature]
        if chosen is not None:
            layer.forward = candidates[chosen]
            count += 1
    return count, {kind: "; ".join(reasons) for kind, reasons in left.items()}


def _note(left: dict[str, list[str]], kind: str, reason: str) -> None:
    reasons = left.setdefault(kind, [])
    if reason not in reasons:
        reasons.append(reason)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if {"self_attn", "mlp"} <= set(dict(module.named_children()))]


@contextmanager
def layer_calls(model: nn.Module) -> Iterator[LayerCalls]:
    """Inside, passes through a model whose attention goes by documents are noted."""
    found = LayerCalls()

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states", None)
        if len(args) <= 1 and isinstance(hidden, Tensor):
            found.keywords[id(layer)] = kwargs
            found.tokens = hidden.shape[1]

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in _layers(model)]
    try:
        with seen_calls() as found.attention:
            yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Replay(nn.Module):
    """A layer as a module of its hidden state alone; the rest is what the model gave it, in that one's dtype."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor], call: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self.run = forward
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, C] -> [1, T, C]."""
        out = self.run(x, **{name: _as(value, x.dtype) for name, value in self.call.items()})
        if not isinstance(out, Tensor):
            raise TypeError(f"the layer gives a {type(out).__name__}, not a tensor")
        return out


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_as(part, dtype) for part in value) if isinstance(value, tuple) else value


def _choose(
    layer: nn.Module, candidates: list[FusedLayer], call: dict[str, Any], dtype: torch.dtype, tokens: int
) -> tuple[int | None, str]:
    width = next(norm for norm in candidates[0].norms if norm is not None).weight.shape[0]
    if not candidates[0].covers(call):
        given = sorted(name for name, value in call.items() if value is not None)
        return None, f"it is called with more than packed rows need ({', '.join(given)})"
    original = _Replay(layer, layer.forward, call)
    reasons: list[str] = []
    with with_trained_adapter(layer):
        for number, candidate in enumerate(candidates):
            verdict = prove(original, _Replay(layer, candidate, call), width, dtype, tokens)
            if verdict.holds:
                return number, ""
            reasons.append(verdict.reason)
    return None, "; ".join(dict.fromkeys(reasons))


def _insides(layer: nn.Module) -> tuple[object, ...]:
    """What two layers must share for the proof of one to cover the other, but for their weights' values."""
    found: list[object] = []
    for name, module in layer.named_modules():
        simple = sorted((key, repr(value)) for key, value in _settings(module).items())
        found.append((name, type(module).__name__, tuple(simple)))
    found += [(name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()]
    return tuple(found)


def _settings(module: nn.Module) -> dict[str, object]:
    """What a module was made with, of what can be compared."""
    if isinstance(module, QuantisedParameter):  # its offset is part of the weight's values
        return {"shape": tuple(module.shape), "dtype": module.dtype, "backend": module.backend}
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "layer_idx" and isinstance(value, int | float | str | None)
    }


def undo_layers(model: PreTrainedModel) -> None:
    """Gives every decoder layer its own forward back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedLayer):
            del module.forward


def _shape_of(call: dict[str, Any]) -> tuple[object, ...]:
    turning = call.get("position_embeddings")
    shapes = () if turning is None else tuple(tuple(x.shape) for x in turning)
    return (shapes, tuple(sorted(name for name, value in call.items() if value is not None)))
