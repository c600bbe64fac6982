"""A gated MLP, down(activation(gate(x)) * up(x)), with its adapters, as one autograd node.

It saves x, gate(x), up(x) and the three x A^T; the product of the two branches is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fitune.fuse.lora_linear import FusedLoraLinear
from fitune.fuse.lora_product import LoraProduct
from fitune.kernels import contract
from fitune.quant.linear import QuantisedLinear

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
        parts = [_factors(getattr(self, name)) for name in PARTS]
        if any(part is None for part in parts):
            result: Tensor = self.original_forward(x)
            return result
        (gate, ga, gb, gs), (up, ua, ub, us), (down, da, db, ds) = parts  # type: ignore[misc]
        flat: Tensor = _GatedMLP.apply(
            x.reshape(-1, x.shape[-1]),
            (gate, up, down),
            (gs, us, ds),
            self.activation,
            self.backend,
            ga,
            gb,
            ua,
            ub,
            da,
            db,
        )
        return flat.view(x.shape)


def _factors(layer: nn.Module) -> tuple[nn.Linear, Tensor | None, Tensor | None, float] | None:
    """Base, A, B and scaling of a projection; None where the fused pass does not cover it as it is now."""
    if isinstance(layer, FusedLoraLinear):
        adapter = layer.adapter_in_use()
        return None if adapter is None else (layer.get_base_layer(), *layer.factors(adapter))
    if isinstance(layer, QuantisedLinear) or (type(layer) is nn.Linear and not layer.weight.requires_grad):
        return layer, None, None, 1.0
    return None


def fused_mlp_candidates(module: nn.Module, backend: str) -> list[FusedGatedMLP]:
    """What `module` may be if it has the structure of a gated MLP; behaviour decides on the activation."""
    children = dict(module.named_children())
    if not set(PARTS) <= set(children) or list(module.parameters(recurse=False)):
        return []
    if any(list(child.parameters()) for name, child in children.items() if name not in PARTS):
        return []
    if any(_factors(children[name]) is None for name in PARTS):
        return []
    return [FusedGatedMLP(module, activation, backend) for activation in ("silu", "gelu_tanh")]


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: tuple[nn.Linear, ...], scalings: tuple[float, ...], activation: str,
        backend: str, *factors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        gate, up, down = (
            LoraProduct.of(base, factors[2 * i], factors[2 * i + 1], scalings[i], x.dtype)
            for i, base in enumerate(bases)
        )
        gated, gate_u = gate.forward(x)
        upped, up_u = up.forward(x)
        inner = contract.gated_activation(gated, upped, activation, backend)
        out, down_u = down.forward(inner)
        ctx.products = gate, up, down
        ctx.activation, ctx.backend = activation, backend
        ctx.save_for_backward(x, gated, upped, gate_u, up_u, down_u)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gated, upped, gate_u, up_u, down_u = ctx.saved_tensors
        gate, up, down = ctx.products
        grad_inner, down_v = down.grad_input(grad_out)
        grad_gated, grad_upped, inner = contract.gated_activation_backward(
            grad_inner, gated, upped, ctx.activation, ctx.backend
        )
        down_grads = down.grad_adapter(grad_out, inner, down_u, down_v)
        grad_x, gate_v = gate.grad_input(grad_gated)
        gate_grads = gate.grad_adapter(grad_gated, x, gate_u, gate_v)
        grad_x, up_v = up.grad_input(grad_upped, into=grad_x)
        up_grads = up.grad_adapter(grad_upped, x, up_u, up_v)
        return grad_x, None, None, None, None, *gate_grads, *up_grads, *down_grads
