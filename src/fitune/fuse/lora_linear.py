"""PEFT's LoRA layer with a fused forward and backward pass.

It stays a PEFT layer in everything else (names, saving, merging, several adapters); what the fused pass does not
cover goes through PEFT's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fitune.fuse.lora_product import SharedProduct
from fitune.quant.linear import QuantisedLinear

# (base, scaling) of each layer, and all A and B in order.
Covered = tuple[list[tuple[nn.Linear, float]], list[Tensor | None]]


class FusedLoraLinear(PeftLinear):
    """y = x W^T + b + s (x A^T) B^T as one autograd node that saves x and x A^T only."""

    def adapter_in_use(self) -> str | None:
        """The adapter the fused pass can compute with now; None: none, or something it does not cover."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or self.lora_variant.get(active[0]) is not None:
            return None
        dropout = self.lora_dropout[active[0]]
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and self.training:
            return None
        return str(active[0])

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """A [R, K], B [N, R] and the scaling of an adapter."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight, float(self.scaling[adapter])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N]."""
        adapter = self.adapter_in_use()
        if adapter is None or args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        a, b, scaling = self.factors(adapter)
        # Reshaped outside: callers may write into what they get, which autograd forbids for views made inside.
        flat: Tensor = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), self.get_base_layer(), a, b, scaling)
        return flat.view(*x.shape[:-1], -1)


def covered(layer: nn.Module) -> tuple[nn.Linear, Tensor | None, Tensor | None, float] | None:
    """Base, A, B and scaling of a projection; None where the fused passes do not cover it as it is now."""
    if isinstance(layer, FusedLoraLinear):
        if layer.disable_adapters and not layer.merged:
            return layer.get_base_layer(), None, None, 1.0
        adapter = layer.adapter_in_use()
        return None if adapter is None else (layer.get_base_layer(), *layer.factors(adapter))
    if isinstance(layer, QuantisedLinear) or (type(layer) is nn.Linear and not layer.weight.requires_grad):
        return layer, None, None, 1.0
    return None


def covered_all(layers: Sequence[nn.Module]) -> Covered | None:
    """(base, scaling) of each layer and all A and B in order; None where one of the layers is not covered."""
    bases: list[tuple[nn.Linear, float]] = []
    factors: list[Tensor | None] = []
    for layer in layers:
        found = covered(layer)
        if found is None:
            return None
        bases.append((found[0], found[3]))
        factors += found[1:3]
    return bases, factors


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        backend = base.backend if isinstance(base, QuantisedLinear) else "reference"
        product = SharedProduct.of([(base, scaling)], [a, b], x.dtype, backend)
        (y,), (u,) = product.forward(x)
        ctx.product = product
        ctx.save_for_backward(x, u)
        return y

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, u = ctx.saved_tensors
        product: SharedProduct = ctx.product
        grad_x, vs = product.grad_input([grad_out])
        grad_a, grad_b = product.grad_adapters([grad_out], x, [u], vs)
        return grad_x, None, grad_a, grad_b, None
