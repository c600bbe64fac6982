"""An attention block as plain arithmetic: projections, norms of queries and keys, rotary, attention, output.

Forward and every gradient without autograd; the decoder layer that is one autograd node is made of such parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fitune.fuse.lora_product import LoraProduct
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
        self.form = form
        self.backend = backend
        self.linears = [getattr(module, name) for name in PROJECTIONS]
        self.norms = tuple(getattr(module, name, None) for name in ("q_norm", "k_norm"))

    def forward(self, x: Tensor, call: LayerCall, products: list[LoraProduct]) -> tuple[Tensor, Saved]:
        """x [M, C] -> [M, C], and what `backward` needs."""
        heads: Saved = []
        factors: Saved = []
        normed: Saved = []
        for index, product in enumerate(products[:3]):
            flat, u = product.forward(x)
            factors.append(u)
            if index == 2:
                heads.append(self._split(flat))
                continue
            head, extra = self._placed(flat, index, call)
            heads.append(head)
            normed += extra
        q, k, v = (head.view(call.rows, call.tokens, *head.shape[1:]) for head in heads)
        form = self.form
        out, lse = contract.attention(q, k, v, call.documents, form.window, form.scale, form.cap, self.backend)
        y, u = products[3].forward(out.view(x.shape[0], -1))
        return y, [q, k, v, out, lse, *factors, u, *normed]

    def backward(
        self, grad: Tensor, x: Tensor, call: LayerCall, products: list[LoraProduct], saved: Saved
    ) -> tuple[Tensor, Saved]:
        """grad [M, C] of the output, x [M, C] -> grad of x, and of A and B of each product."""
        q, k, v, out, lse, u_q, u_k, u_v, u_o, *normed = saved
        output = products[3]
        grad_out, v_o = output.grad_input(grad)
        output_grads = output.grad_adapter(grad, out.view(x.shape[0], -1), u_o, v_o)
        form = self.form
        grads = contract.attention_backward(
            grad_out.view(out.shape), q, k, v, out, lse, call.documents, form.window, form.scale, form.cap,
            self.backend,
        )  # fmt: skip
        grad_x: Tensor | None = None
        factor_grads: Saved = []
        for index, (product, grad_heads, u) in enumerate(zip(products[:3], grads, (u_q, u_k, u_v), strict=True)):
            grad_flat = grad_heads.reshape(x.shape[0], -1)
            if index < 2:
                grad_flat = self._taken_back(grad_flat, index, call, normed[2 * index : 2 * index + 2])
            grad_x, v_part = product.grad_input(grad_flat, into=grad_x)
            factor_grads += product.grad_adapter(grad_flat, x, u, v_part)
        assert grad_x is not None
        return grad_x, [*factor_grads, *output_grads]

    def _split(self, flat: Tensor) -> Tensor:
        return flat.view(flat.shape[0], -1, self.form.head_dim)

    def _placed(self, flat: Tensor, index: int, call: LayerCall) -> tuple[Tensor, Saved]:
        """Queries or keys [M, H * D] -> [M, H, D] normed and turned, and what their norm's gradient needs."""
        heads = self._split(flat)
        norm = self.norms[index]
        if norm is None:
            return self._turned(heads, call), [None, None]
        if self.form.turned_first:
            heads = self._turned(heads, call)
        raw = self._of_norm(heads, norm)
        heads, rstd = contract.rms_norm(raw, norm.weight, norm.eps, norm.shift, self.backend)
        heads = heads.view(flat.shape[0], -1, self.form.head_dim)
        return (heads if self.form.turned_first else self._turned(heads, call)), [raw, rstd]

    def _taken_back(self, grad: Tensor, index: int, call: LayerCall, saved: Saved) -> Tensor:
        """The gradient of `_placed`, [M, H * D] both."""
        norm, (raw, rstd) = self.norms[index], saved
        heads = self._split(grad)
        if norm is None:
            return self._turned(heads, call, inverse=True).reshape(grad.shape)
        if not self.form.turned_first:
            heads = self._turned(heads, call, inverse=True)
        heads = contract.rms_norm_backward(
            self._of_norm(heads, norm), raw, norm.weight, rstd, norm.shift, self.backend
        ).view(grad.shape[0], -1, self.form.head_dim)  # fmt: skip
        return (self._turned(heads, call, inverse=True) if self.form.turned_first else heads).reshape(grad.shape)

    def _of_norm(self, heads: Tensor, norm: FusedNorm) -> Tensor:
        """Heads as a norm of their width takes them: each by itself, or all of a token together."""
        return heads if norm.weight.shape[0] == self.form.head_dim else heads.reshape(heads.shape[0], -1)

    def _turned(self, heads: Tensor, call: LayerCall, inverse: bool = False) -> Tensor:
        if not self.form.rotary or call.cos is None or call.sin is None:
            return heads
        return contract.rotate(heads, call.cos, call.sin, inverse, self.backend)


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
