"""An attention block as plain arithmetic: projections, norms of queries and keys, rotary, attention, output.

Forward and every gradient without autograd; the decoder layer that is one autograd node is made of such parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fitune.fuse.attention import masked_attention
from fitune.fuse.lora_product import Factors, SharedProduct
from fitune.fuse.norm import FusedNorm
from fitune.kernels import contract

Saved = list[Any]  # tensors, and None where there is none
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LayerCall:
    """What a pass through a layer is given besides its hidden state.

    Attributes:
        rows, tokens: B and T of the hidden state [B * T, C].
        documents: as the attention operator takes them.
        cos, sin: of the positions, [B * T, half] float32; None without a rotary embedding.
    """

    rows: int
    tokens: int
    documents: Tensor
    cos: Tensor | None
    sin: Tensor | None


@dataclass(frozen=True)
class CachedCall:
    """A pass of new tokens after those in a key-value cache.

    Attributes:
        rows, tokens, cos, sin: as of a `LayerCall`.
        cache: transformers' cache, or one with the same `update`.
        mask: [B, 1, T, S] of what each new token attends to; None: as `masked_attention` says.
    """

    rows: int
    tokens: int
    cache: Any
    mask: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


@dataclass(frozen=True)
class AttentionForm:
    """What an attention module makes of its projections.

    Attributes:
        head_dim: D.
        scale, window, cap: of the attention operator.
        rotary: whether queries and keys are turned by their positions.
        turned_first: whether that comes before their norms.
    """

    head_dim: int
    scale: float
    window: int = 0
    cap: float = 0.0
    rotary: bool = True
    turned_first: bool = False


class AttentionPart:
    """The arithmetic of one attention module, whose projections and norms it uses and does not own.

    Attributes:
        linears: the projections of queries, keys, values and the output; `forward` wants their products.
    """

    def __init__(self, module: nn.Module, form: AttentionForm, backend: str) -> None:
        self.module = module
        self.form = form
        self.backend = backend
        self.linears = [getattr(module, name) for name in PROJECTIONS]
        self.norms = tuple(getattr(module, name, None) for name in ("q_norm", "k_norm"))

    def products(
        self, bases: Sequence[tuple[nn.Linear, float]], factors: Factors, dtype: torch.dtype
    ) -> list[SharedProduct]:
        """Queries, keys and values in one, and the output, for (base, scaling) of each and its A and B in turn."""
        return [
            SharedProduct.of(bases[:3], factors[:6], dtype, self.backend),
            SharedProduct.of(bases[3:], factors[6:], dtype, self.backend),
        ]

    def forward(self, x: Tensor, call: LayerCall, products: Sequence[SharedProduct]) -> tuple[Tensor, Saved]:
        """x [M, C] -> [M, C], and what `backward` needs."""
        inputs, output = products
        (queries, keys, values), us = inputs.forward(x)
        q, *for_q = self._placed(queries, 0, call)
        k, *for_k = self._placed(keys, 1, call)
        q, k, v = (head.view(call.rows, call.tokens, *head.shape[1:]) for head in (q, k, self._split(values)))
        form = self.form
        out, lse = contract.attention(q, k, v, call.documents, form.window, form.scale, form.cap, self.backend)
        (y,), output_us = output.forward(out.view(x.shape[0], -1))
        return y, [q, k, v, out, lse, *us, *output_us, *for_q, *for_k]

    def forward_cached(
        self, x: Tensor, call: CachedCall, products: Sequence[SharedProduct]
    ) -> Tensor:  # fmt: skip
        """x [M, C] of new tokens -> [M, C], attending to those in the cache, which takes up the new ones too."""
        inputs, output = products
        (queries, keys, values), _ = inputs.forward(x)
        heads = self._placed(queries, 0, call)[0], self._placed(keys, 1, call)[0], self._split(values)
        q, k, v = (head.view(call.rows, call.tokens, *head.shape[1:]).transpose(1, 2) for head in heads)
        k, v = call.cache.update(k, v, self.module.layer_idx)
        form = self.form
        out = masked_attention(q, k, v, call.mask, form.scale, form.window, form.cap)
        return output.forward(out.view(x.shape[0], -1))[0][0]

    def backward(
        self, grad: Tensor, x: Tensor, call: LayerCall, products: Sequence[SharedProduct], saved: Saved
    ) -> tuple[Tensor, Saved]:
        """grad [M, C] of the output, x [M, C] -> grad of x, and of A and B of each projection."""
        inputs, output = products
        q, k, v, out, lse = saved[:5]
        us, output_us, for_q, for_k = saved[5:8], saved[8:9], saved[9:11], saved[11:13]
        grad_out, output_vs = output.grad_input([grad])
        output_grads = output.grad_adapters([grad], out.view(x.shape[0], -1), output_us, output_vs)
        form = self.form
        grad_q, grad_k, grad_v = (
            heads.reshape(x.shape[0], -1)
            for heads in contract.attention_backward(
                grad_out.view(out.shape), q, k, v, out, lse, call.documents, form.window, form.scale, form.cap,
                self.backend,
            )
        )  # fmt: skip
        grads = [self._taken_back(grad_q, 0, call, for_q), self._taken_back(grad_k, 1, call, for_k), grad_v]
        grad_x, vs = inputs.grad_input(grads)
        return grad_x, [*inputs.grad_adapters(grads, x, us, vs), *output_grads]

    def _split(self, flat: Tensor) -> Tensor:
        return flat.view(flat.shape[0], -1, self.form.head_dim)

    def _placed(self, flat: Tensor, index: int, call: LayerCall | CachedCall) -> Saved:
        """Queries or keys [M, H * D] -> [M, H, D] normed and turned, and what their norm's gradient needs."""
        heads = self._split(flat)
        norm = self.norms[index]
        if norm is None:
            return [self._turned(heads, call), None, None]
        if self.form.turned_first:
            heads = self._turned(heads, call)
        raw = self._of_norm(heads, norm)
        heads, rstd = contract.rms_norm(raw, norm.weight, norm.eps, norm.shift, self.backend)
        heads = heads.view(flat.shape[0], -1, self.form.head_dim)
        return [heads if self.form.turned_first else self._turned(heads, call), raw, rstd]

    def _taken_back(self, grad: Tensor, index: int, call: LayerCall, saved: Saved) -> Tensor:
        """The gradient of `_placed`, [M, H * D] both."""
        norm, (raw, rstd) = self.norms[index], saved
        heads = self._split(grad)
        if norm is None:
            return self._turned(heads, call, inverse=True).reshape(grad.shape)
        if not self.form.turned_first:
            heads = self._turned(heads, call, inverse=True)
        heads = contract.rms_norm_backward(
            self._of_norm(heads, norm), raw, norm.weight, rstd, None, norm.shift, self.backend
        ).view(grad.shape[0], -1, self.form.head_dim)  # fmt: skip
        return (self._turned(heads, call, inverse=True) if self.form.turned_first else heads).reshape(grad.shape)

    def _of_norm(self, heads: Tensor, norm: FusedNorm) -> Tensor:
        """Heads as a norm of their width takes them: each by itself, or all of a token together."""
        return heads if norm.weight.shape[0] == self.form.head_dim else heads.reshape(heads.shape[0], -1)

    def _turned(self, heads: Tensor, call: LayerCall | CachedCall, inverse: bool = False) -> Tensor:
        """The heads turned in place: they are always this part's own."""
        if self.form.rotary and call.cos is not None and call.sin is not None:
            contract.rotate_(heads, call.cos, call.sin, inverse, self.backend)
        return heads


def attention_forms(module: nn.Module, scale: float | None, window: int, cap: float) -> list[AttentionForm]:
    """The forms that a module with this structure may have; behaviour decides. Empty: it is no such module.

    `scale`, `window`, `cap`: what the module was seen to hand to its attention function (scale None: not seen).
    """
    if any(not isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS):
        return []
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    known = {*PROJECTIONS, "q_norm", "k_norm"}
    others = [name for name, child in module.named_children() if name not in known and list(child.parameters())]
    if others or any(norm is not None and not isinstance(norm, FusedNorm) for norm in norms):
        return []
    if (norms[0] is None) != (norms[1] is None) or list(module.parameters(recurse=False)):
        return []
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim < 1:
        return []
    scale = head_dim**-0.5 if scale is None else scale
    orders = (False, True) if norms[0] is not None else (False,)
    return [
        AttentionForm(head_dim, scale, window, cap, rotary, first)
        for first in orders
        for rotary in (True, False)
    ]  # fmt: skip
