"""A gated MLP, down(activation(gate(x)) * up(x)), with its adapters, as one autograd node.

It saves x, gate(x), up(x) and the three x A^T; the product of the two branches is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fitune.fuse.lora_linear import covered, covered_all
from fitune.fuse.lora_product import Factors, SharedProduct
from fitune.kernels import contract

PARTS = ("gate_proj", "up_proj", "down_proj")


class FusedGatedMLP(nn.Module):
    """The replaced module's own three projections under their own names, run as one."""

    def __init__(self, original: nn.Module, activation: str, backend: str) -> None:
        super().__init__()
        for name in PARTS:
            self.add_module(name, getattr(original, name))
        self.original_forward = original.forward
        self.activation = activation
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        part = self.part()
        parts = covered_all(part.linears)
        if parts is None:
            result: Tensor = self.original_forward(x)
            return result
        bases, factors = parts
        flat: Tensor = _GatedMLP.apply(x.reshape(-1, x.shape[-1]), part, bases, *factors)
        return flat.view(x.shape)

    def part(self) -> GatedMLPPart:
        """The arithmetic, with the projections as they are now."""
        return GatedMLPPart(self, self.activation, self.backend)


def fused_mlp_candidates(module: nn.Module, backend: str) -> list[FusedGatedMLP]:
    """What `module` may be if it has the structure of a gated MLP; behaviour decides on the activation."""
    children = dict(module.named_children())
    if not set(PARTS) <= set(children) or list(module.parameters(recurse=False)):
        return []
    if any(list(child.parameters()) for name, child in children.items() if name not in PARTS):
        return []
    if any(covered(children[name]) is None for name in PARTS):
        return []
    return [FusedGatedMLP(module, activation, backend) for activation in ("silu", "gelu_tanh")]


class GatedMLPPart:
    """The arithmetic of a gated MLP, whose projections it uses and does not own.

    Attributes:
        linears: the projections gate, up and down.
    """

    def __init__(self, module: nn.Module, activation: str, backend: str) -> None:
        self.linears = [getattr(module, name) for name in PARTS]
        self.activation = activation
        self.backend = backend

    def products(
        self, bases: Sequence[tuple[nn.Linear, float]], factors: Factors, dtype: torch.dtype
    ) -> list[SharedProduct]:
        """Gate and up in one, and down, for (base, scaling) of each projection and its A and B in turn."""
        return [
            SharedProduct.of(bases[:2], factors[:4], dtype, self.backend),
            SharedProduct.of(bases[2:], factors[4:], dtype, self.backend),
        ]

    def forward(self, x: Tensor, products: Sequence[SharedProduct]) -> tuple[Tensor, list[Tensor]]:
        """x [M, C] -> [M, C], and what `backward` needs."""
        branches, down = products
        (gated, upped), us = branches.forward(x)
        inner = contract.gated_activation(gated, upped, self.activation, self.backend)
        (out,), down_us = down.forward(inner)
        return out, [gated, upped, *us, *down_us]

    def forward_again(self, x: Tensor, products: Sequence[SharedProduct], down_u: Tensor) -> list[Tensor]:
        """What `backward` needs, without the output; `down_u` is the last that `forward` gave."""
        (gated, upped), us = products[0].forward(x)
        return [gated, upped, *us, down_u]

    def backward(
        self, grad: Tensor, x: Tensor, products: Sequence[SharedProduct], saved: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """grad [M, C] of the output, x [M, C] -> grad of x, and of A and B of each projection."""
        gated, upped, *us = saved
        branches, down = products
        grad_inner, down_vs = down.grad_input([grad])
        *grads, inner = contract.gated_activation_backward(grad_inner, gated, upped, self.activation, self.backend)
        down_grads = down.grad_adapters([grad], inner, us[2:], down_vs)
        grad_x, vs = branches.grad_input(grads)
        return grad_x, [*branches.grad_adapters(grads, x, us[:2], vs), *down_grads]


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, part: GatedMLPPart, bases: Sequence[tuple[nn.Linear, float]], *factors: Tensor | None
    ) -> Tensor:
        ctx.part, ctx.products = part, part.products(bases, factors, x.dtype)
        out, saved = part.forward(x, ctx.products)
        ctx.save_for_backward(x, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        grad_x, grads = ctx.part.backward(grad_out, x, ctx.products, saved)
        return grad_x, None, None, *grads
