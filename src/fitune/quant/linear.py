"""A linear layer whose frozen weight is NF4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fitune.quant.lease import DecodedAtUse, Lease
from fitune.quant.mapped_pages import give_back, is_mapped, spans_of
from fitune.quant.nf4 import NF4Weight
from fitune.quant.parameter import QuantisedParameter


class QuantisedLinear(nn.Linear):
    """y = x W^T + b with a frozen NF4 weight.

    `weight` is a `QuantisedParameter`: code that reaches past `forward` for it finds a tensor's behaviour, and
    whatever shards or moves parameters finds the stored ones. A subclass of `nn.Linear`, so that PEFT accepts it as
    a base layer.

    Attributes:
        backend: which kernels decode the weight.
        lease: how the weight is reached.
    """

    def __init__(
        self, weight: NF4Weight, bias: Tensor | None, backend: str, dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a dense weight
        self.out_features, self.in_features = weight.shape
        self.weight = QuantisedParameter(weight, dtype or weight.dtype, backend)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.backend = backend
        self.lease: Lease = DecodedAtUse()

    def nf4(self) -> NF4Weight:
        """The frozen weight as it is stored."""
        return self.stored.nf4()

    @property
    def stored(self) -> QuantisedParameter:
        """The weight's holder."""
        return self._modules["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype; differentiable in x."""
        y: Tensor = _FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, nf4"


class _FrozenProduct(torch.autograd.Function):
    """x W^T; the backward pass decodes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return product(x, linear)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        return product_transposed(grad_out, ctx.linear), None


def product_alone(x: Tensor, linear: nn.Linear) -> Tensor:
    """x [..., in] -> x W^T [..., out] of a frozen layer, quantised or not, without its bias; differentiable in x."""
    if isinstance(linear, QuantisedLinear):
        y: Tensor = _FrozenProduct.apply(x, linear)
        return y
    return nn.functional.linear(x, linear.weight.detach().to(x.dtype))


@contextmanager
def held(linear: nn.Linear, dtype: torch.dtype) -> Iterator[Tensor]:
    """The dense weight [out, in] of a frozen layer, quantised or not; valid inside."""
    if not isinstance(linear, QuantisedLinear):
        yield linear.weight.detach().to(dtype)
        return
    weight = linear.lease.acquire(linear, dtype)
    try:
        yield weight
    finally:
        linear.lease.release(linear)


@contextmanager
def held_once(linear: nn.Linear, dtype: torch.dtype) -> Iterator[Tensor]:
    """As `held`, for one look at each weight of a model in turn: the pages of a mapped one are let go after it."""
    with held(linear, dtype) as weight:
        yield weight
    tensors = linear.stored.own_tensors() if isinstance(linear, QuantisedLinear) else (linear.weight.data,)
    give_back(spans_of(tensor for tensor in tensors if is_mapped(tensor)))


def product(x: Tensor, linear: QuantisedLinear) -> Tensor:
    """x [..., in] -> x W^T [..., out]; not differentiable."""
    with held(linear, x.dtype) as weight:
        return torch.matmul(x, weight.t())


def product_transposed(grad_out: Tensor, linear: QuantisedLinear) -> Tensor:
    """grad_out [..., out] -> grad_out W [..., in]; not differentiable."""
    with held(linear, grad_out.dtype) as weight:
        return torch.matmul(grad_out, weight)
