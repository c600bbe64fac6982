"""One linear layer with its LoRA update as plain arithmetic: forward, and every gradient, without autograd.

y = x W^T + b + s (x A^T) B^T. The fused modules are made of these; W is reached through its lease.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fitune.quant.linear import held


@dataclass(frozen=True)
class LoraProduct:
    """A frozen base and (unless `a` is None) its adapter, in the dtype of the computation.

    Attributes:
        base: the frozen layer, weight [N, K].
        a: [R, K]; b: [N, R], the scaling already in it.
        scaling: s.
    """

    base: nn.Linear
    a: Tensor | None
    b: Tensor | None
    scaling: float

    @classmethod
    def of(
        cls, base: nn.Linear, a: Tensor | None, b: Tensor | None, scaling: float, dtype: torch.dtype
    ) -> LoraProduct:
        """From the adapter's float32 parameters."""
        if a is None or b is None:
            return cls(base, None, None, scaling)
        return cls(base, a.detach().to(dtype), (b.detach() * scaling).to(dtype), scaling)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [M, K] -> y [M, N] and u = x A^T [M, R], which the backward pass wants."""
        with held(self.base, x.dtype) as weight:
            if self.base.bias is not None:
                y = torch.addmm(self.base.bias.to(x.dtype), x, weight.t())
            else:
                y = torch.mm(x, weight.t())
        if self.a is None or self.b is None:
            return y, None
        u = torch.mm(x, self.a.t())
        return y.addmm_(u, self.b.t()), u

    def grad_input(self, grad: Tensor, into: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """grad of y [M, N] -> grad of x [M, K] (added to `into` if given), and v = s grad B [M, R]."""
        with held(self.base, grad.dtype) as weight:
            grad_x = torch.mm(grad, weight) if into is None else into.addmm_(grad, weight)
        if self.a is None or self.b is None:
            return grad_x, None
        v = torch.mm(grad, self.b)
        return grad_x.addmm_(v, self.a), v

    def grad_adapter(
        self, grad: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of A [R, K] and B [N, R] in float32."""
        if u is None or v is None:
            return None, None
        return torch.mm(v.t(), x).float(), torch.mm(grad.t(), u).float().mul_(self.scaling)


def products_of(
    bases: Sequence[tuple[nn.Linear, float]], factors: Sequence[Tensor | None], dtype: torch.dtype
) -> list[LoraProduct]:
    """Of (base, scaling) pairs and their A and B in order."""
    return [
        LoraProduct.of(base, factors[2 * index], factors[2 * index + 1], scaling, dtype)
        for index, (base, scaling) in enumerate(bases)
    ]
