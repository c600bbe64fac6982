"""A whole decoder layer as one autograd node.

What it saves is chosen here: the residual stream before each half of the layer, and what the halves' own parts ask
for; norms are computed again in the backward pass. With `recompute` it saves the layer's input, and computes all but
the last product again. The layer stays the module it was, its `forward` is replaced:
names, parameters, adapters and whatever looks for its class find what they found before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fitune.fuse.attention_part import AttentionForm, AttentionPart, CachedCall, LayerCall, Saved
from fitune.fuse.gated_mlp import FusedGatedMLP, GatedMLPPart
from fitune.fuse.layer_step import SlotLike, packed_step, slots_of
from fitune.fuse.lora_linear import Covered, covered_all
from fitune.fuse.lora_product import Factors, SharedProduct
from fitune.fuse.norm import FusedNorm
from fitune.kernels import contract
from fitune.kernels.decode_native import DecodeLayer
from fitune.quant.nf4 import DYNAMIC_MAP

# Arguments of a layer that may have any value here: they say what its other arguments already do.
_IDLE = {"position_ids", "cache_position", "use_cache", "position_embeddings"}
# Requests for more results: idle while they are not made.
_REQUESTS = {"output_attentions", "output_hidden_states", "output_router_logits"}
# Those that a pass after a key-value cache has.
_CACHED = {"past_key_values", "attention_mask"}


@dataclass(frozen=True)
class LayerForm:
    """How a layer's two halves stand on the residual stream: x + scale * after(part(before(x))).

    Attributes:
        norms: names of the norms before and after the attention, before and after the MLP; None: there is none.
        scale: of both halves.
    """

    norms: tuple[str | None, str | None, str | None, str | None]
    scale: float = 1.0


class Positions:
    """The rotary embedding's cosines and sines as the operators take them, made once for all layers of a pass."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, Tensor] | None = None
        self._made: tuple[Tensor, Tensor] | None = None

    def of(self, given: tuple[Tensor, Tensor], rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        """cos, sin [1 or B, T, 2 * half] -> [B * T, half] float32 each."""
        if (
            self._made is None
            or self._given is None
            or any(a is not b for a, b in zip(given, self._given, strict=True))
        ):
            self._made = _halved(given[0], rows, tokens), _halved(given[1], rows, tokens)
            self._given = given
        return self._made


def _halved(x: Tensor, rows: int, tokens: int) -> Tensor:
    half = x.shape[-1] // 2
    return x[..., :half].expand(rows, tokens, half).float().reshape(-1, half).contiguous()


class FusedLayer:
    """The pass through one decoder layer; calls the original where it does not cover how it is called.

    Attributes:
        recompute: whether a pass with gradients saves the layer's input only, and computes the rest again.
    """

    def __init__(
        self, layer: nn.Module, form: LayerForm, attention: AttentionPart, mlp: GatedMLPPart, positions: Positions,
        backend: str,
    ) -> None:  # fmt: skip
        self.original: Callable[..., Tensor] = layer.forward
        self.form = form
        self.attention = attention
        self.mlp = mlp
        self.norms: list[FusedNorm | None] = [None if name is None else getattr(layer, name) for name in form.norms]
        self.linears = [*attention.linears, *mlp.linears]
        self.positions = positions
        self.backend = backend
        self.recompute = False

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, T, C] -> [B, T, C]."""
        given = _given(kwargs)
        cached = "past_key_values" in given <= _CACHED and self.continues and not torch.is_grad_enabled()
        stepped = self._stepped(hidden_states, kwargs) if cached and not args else None
        if stepped is not None:
            return stepped
        parts = covered_all(self.linears) if not args and (cached or given == {"documents"}) else None
        if parts is None:
            if self.recompute and torch.is_grad_enabled():
                again: Tensor = checkpoint(self.original, hidden_states, *args, use_reentrant=False, **kwargs)
                return again
            return self.original(hidden_states, *args, **kwargs)
        rows, tokens, width = hidden_states.shape
        turning = kwargs.get("position_embeddings")
        cos, sin = (None, None) if turning is None else self.positions.of(turning, rows, tokens)
        bases, factors = parts
        flat = hidden_states.reshape(-1, width)
        if not cached:
            call = LayerCall(rows, tokens, kwargs["documents"], cos, sin)
            out: Tensor = _Layer.apply(flat, self, call, bases, *factors)
        else:
            after = CachedCall(rows, tokens, kwargs["past_key_values"], kwargs.get("attention_mask"), cos, sin)
            out = self._continued(flat, after, bases, factors)
        return out.view(rows, tokens, width)

    def covers(self, kwargs: dict[str, Any]) -> bool:
        """Whether packed rows with these keyword arguments are computed here, and not by the original."""
        return _given(kwargs) == {"documents"} and covered_all(self.linears) is not None

    @property
    def continues(self) -> bool:
        """Whether the layer knows its place in a key-value cache."""
        return isinstance(getattr(self.attention.module, "layer_idx", None), int)

    def _stepped(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """One new token of each row [B, 1, C] in a native call; None where the cache or layer is not made for it."""
        rows, tokens, width = hidden_states.shape
        slots = slots_of(kwargs["past_key_values"]) if tokens == 1 else None
        if slots is None:
            return None
        turning = kwargs.get("position_embeddings")
        cos, sin = (None, None) if turning is None else self.positions.of(turning, rows, tokens)
        place = self.attention.module.layer_idx
        if place not in slots.kept:
            parts = covered_all(self.linears)
            half = 0 if cos is None else cos.shape[1]
            slots.kept[place] = None if parts is None else self._step(parts, hidden_states.dtype, half, slots)
        step: DecodeLayer | None = slots.kept[place]
        if step is None:
            return None
        out = step.step(hidden_states.view(rows, width), cos, sin, slots.columns, slots.shared, DYNAMIC_MAP)
        return out.view(rows, tokens, width)

    def _step(self, parts: Covered, dtype: torch.dtype, half: int, slots: SlotLike) -> DecodeLayer | None:
        attending, feeding = self.products(*parts, dtype)
        return packed_step(self, [*attending, *feeding], dtype, half, slots)

    def _continued(
        self, x: Tensor, call: CachedCall, bases: Sequence[tuple[nn.Linear, float]], factors: Factors
    ) -> Tensor:
        """x [M, C] of new tokens -> [M, C]; no gradients."""
        attending, feeding = self.products(bases, factors, x.dtype)
        _, half = _half(self, 0, x, lambda inner: (self.attention.forward_cached(inner, call, attending), []))
        _, out = _half(self, 2, half, lambda inner: self.mlp.forward(inner, feeding))
        return out

    def products(
        self, bases: Sequence[tuple[nn.Linear, float]], factors: Factors, dtype: torch.dtype
    ) -> tuple[list[SharedProduct], list[SharedProduct]]:
        """Those of the attention and of the MLP."""
        count = len(self.attention.linears)
        return (
            self.attention.products(bases[:count], factors[: 2 * count], dtype),
            self.mlp.products(bases[count:], factors[2 * count :], dtype),
        )

    def norm(self, x: Tensor, place: int) -> tuple[Tensor, Tensor | None]:
        """x through the norm at this place of the form, and its inverse root mean squares."""
        norm = self.norms[place]
        if norm is None:
            return x, None
        out, rstd = contract.rms_norm(x, norm.weight, norm.eps, norm.shift, self.backend)
        return out, rstd

    def norm_backward(
        self, grad: Tensor, x: Tensor | None, rstd: Tensor | None, place: int, residual: Tensor | None = None
    ) -> Tensor:
        """The gradient of `norm`, plus the residual."""
        norm = self.norms[place]
        if norm is None:
            return grad if residual is None else residual + grad
        grad_x: Tensor = contract.rms_norm_backward(grad, x, norm.weight, rstd, residual, norm.shift, self.backend)
        return grad_x


def _given(kwargs: dict[str, Any]) -> set[str]:
    """The keyword arguments that a layer has to heed."""
    idle = {name for name in _REQUESTS if kwargs.get(name) is False}
    return {name for name, value in kwargs.items() if value is not None} - _IDLE - idle


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FusedLayer, call: LayerCall, bases: Sequence[tuple[nn.Linear, float]],
        *factors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        attending, feeding = layer.products(bases, factors, x.dtype)
        first, half = _half(layer, 0, x, lambda inner: layer.attention.forward(inner, call, attending))
        second, out = _half(layer, 2, half, lambda inner: layer.mlp.forward(inner, feeding))
        ctx.layer, ctx.call, ctx.products, ctx.saved_by_first = layer, call, (attending, feeding), len(first)
        ctx.recompute = layer.recompute
        if layer.recompute:
            ctx.save_for_backward(x, second[-1])
        else:
            ctx.save_for_backward(x, half, *first, *second)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, call, (attending, feeding) = ctx.layer, ctx.call, ctx.products
        if ctx.recompute:
            x, down_u = ctx.saved_tensors
            first, half = _half(layer, 0, x, lambda inner: layer.attention.forward(inner, call, attending))
            second = _second_half_again(layer, half, feeding, down_u)
        else:
            x, half, *saved = ctx.saved_tensors
            first, second = saved[: ctx.saved_by_first], saved[ctx.saved_by_first :]
        grad, mlp_grads = _half_backward(
            layer, 2, grad, half, second,
            lambda g, inner, kept: layer.mlp.backward(g, inner, feeding, kept),
        )  # fmt: skip
        grad, attention_grads = _half_backward(
            layer, 0, grad, x, first,
            lambda g, inner, kept: layer.attention.backward(g, inner, call, attending, kept),
        )  # fmt: skip
        return grad, None, None, None, *attention_grads, *mlp_grads


def _half(
    layer: FusedLayer, place: int, x: Tensor, part: Callable[[Tensor], tuple[Tensor, Saved]]
) -> tuple[Saved, Tensor]:  # fmt: skip
    """x + scale * after(part(before(x))), and what its gradient needs."""
    inner, rstd = layer.norm(x, place)
    raw, saved = part(inner)
    out, after_rstd = layer.norm(raw, place + 1)
    total = contract.add_scaled(x, out, layer.form.scale, layer.backend)
    return [rstd, None if after_rstd is None else raw, after_rstd, *saved], total


def _second_half_again(layer: FusedLayer, half: Tensor, feeding: Sequence[SharedProduct], down_u: Tensor) -> Saved:
    """What the MLP's gradient needs; its output only where a norm after it asks for that."""
    if layer.norms[3] is not None:
        return _half(layer, 2, half, lambda inner: layer.mlp.forward(inner, feeding))[0]
    inner, rstd = layer.norm(half, 2)
    return [rstd, None, None, *layer.mlp.forward_again(inner, feeding, down_u)]


def _half_backward(
    layer: FusedLayer, place: int, grad: Tensor, x: Tensor, saved: Saved,
    part: Callable[[Tensor, Tensor, Saved], tuple[Tensor, Saved]],
) -> tuple[Tensor, Saved]:  # fmt: skip
    """The gradient of x, and of the part's factors."""
    rstd, raw, after_rstd, *kept = saved
    inner, _ = layer.norm(x, place)
    scaled = grad if layer.form.scale == 1.0 else grad * layer.form.scale
    grad_raw = layer.norm_backward(scaled.contiguous(), raw, after_rstd, place + 1)
    grad_inner, factor_grads = part(grad_raw, inner, kept)
    return layer.norm_backward(grad_inner, x, rstd, place, grad), factor_grads


def layer_forms(layer: nn.Module) -> list[LayerForm]:
    """The forms that a layer with this structure may have; behaviour decides. Empty: it is no such layer."""
    norms = [name for name, child in layer.named_children() if isinstance(child, FusedNorm)]
    known = {*norms, "self_attn", "mlp"}
    if any(list(child.parameters()) for name, child in layer.named_children() if name not in known):
        return []
    if list(layer.parameters(recurse=False)) or not isinstance(getattr(layer, "mlp", None), FusedGatedMLP):
        return []
    if any(getattr(layer, name).weight.requires_grad for name in norms):
        return []
    scales = [1.0]
    multiplier = getattr(layer, "residual_multiplier", None)
    if isinstance(multiplier, float) and multiplier != 1.0:
        scales.insert(0, multiplier)
    if len(norms) == 2:
        places: list[tuple[str | None, str | None, str | None, str | None]] = [
            (norms[0], None, norms[1], None),
            (None, norms[0], None, norms[1]),
        ]
    elif len(norms) == 4:
        places = [(norms[0], norms[1], norms[2], norms[3])]
    else:
        return []
    return [LayerForm(names, scale) for names in places for scale in scales]


def fused_layer_candidates(
    layer: nn.Module, attention_forms: Sequence[AttentionForm], positions: Positions, backend: str
) -> list[FusedLayer]:  # fmt: skip
    """What a layer may be, over the forms of its attention and its own."""
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, FusedGatedMLP):
        return []
    return [
        FusedLayer(layer, form, AttentionPart(layer.self_attn, attention, backend), mlp.part(), positions, backend)
        for attention in attention_forms
        for form in layer_forms(layer)
    ]
