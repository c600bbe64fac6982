"""The lease: how a frozen weight is reached, and for how long.

No module above knows where a weight lives. It asks its lease for a dense copy, uses it, and gives it back;
whether that decodes NF4 now, or hands out a copy decoded earlier, is the policy's affair. Policies that keep
weights on disk, in host memory or on another rank belong here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from fitune.kernels import products

if TYPE_CHECKING:
    from fitune.quant.linear import QuantisedLinear
    from fitune.quant.nf4 import NF4Weight


class Lease(Protocol):
    """A policy for the frozen weights of one model."""

    def acquire(self, linear: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        """The dense weight [out, in] in `dtype`; valid until `release`."""

    def release(self, linear: QuantisedLinear) -> None:
        """The weight is not needed for now."""

    def acquire_stored(self, linear: QuantisedLinear) -> NF4Weight | None:
        """The weight as it is stored, for products that decode on the way; None: take the dense one. `release` it."""


class DecodedAtUse:
    """The NF4 weight stays where it is (resident or mapped) and is decoded anew at every use."""

    def acquire(self, linear: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        return linear.nf4().dense(dtype, linear.backend)

    def release(self, linear: QuantisedLinear) -> None:
        pass

    def acquire_stored(self, linear: QuantisedLinear) -> NF4Weight | None:
        return linear.nf4()


class DecodedOnce:
    """A dense copy of every weight is kept after its first use: two bytes a weight for speed.

    For phases with few tokens at a time (generation), where decoding a dense copy would cost more than the product.
    """

    def __init__(self) -> None:
        self._dense: dict[int, Tensor] = {}

    def acquire(self, linear: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        weight = self._dense.get(id(linear))
        if weight is None or weight.dtype != dtype:
            weight = self._dense[id(linear)] = linear.nf4().dense(dtype, linear.backend)
        return weight

    def release(self, linear: QuantisedLinear) -> None:
        pass

    def acquire_stored(self, linear: QuantisedLinear) -> NF4Weight | None:
        return None


def lease_for_generation(backend: str, dtype: torch.dtype, is_streamed: bool = False) -> Lease:
    """The policy for a few tokens at a time: products that read the 4 bits themselves are quicker than dense ones.

    `is_streamed`: the stored weights do not all stay in memory, so that dense ones must not either.
    """
    natively = backend == "native" and products.natively_multiplied(dtype)
    return DecodedAtUse() if natively or is_streamed else DecodedOnce()


@contextmanager
def leased(model: nn.Module, lease: Lease) -> Iterator[None]:
    """Inside, every quantised linear of `model` reaches its weight through `lease`; afterwards as before."""
    from fitune.quant.linear import QuantisedLinear

    linears = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    before = [linear.lease for linear in linears]
    for linear in linears:
        linear.lease = lease
    try:
        yield
    finally:
        for linear, old in zip(linears, before, strict=True):
            linear.lease = old
