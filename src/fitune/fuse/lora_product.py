"""Frozen linear layers of one input with their LoRA updates as plain arithmetic, without autograd.

y = x W^T + b + s (x A^T) B^T for each of them. The fused modules are made of these; W is reached through its lease,
and stays in its 4 bits where the kernels decode it on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fitune.kernels import products
from fitune.quant.linear import QuantisedLinear
from fitune.quant.nf4 import DYNAMIC_MAP

# What a layer's adapter is: A [R, K] and B [N, R], as parameters; both None where there is none.
Factors = Sequence[Tensor | None]


@dataclass(frozen=True)
class SharedProduct:
    """Layers that take the same input, in the dtype of the computation.

    Attributes:
        bases: the frozen layers, weights [N, K].
        scalings: s of each.
        factors: A and B of each in turn, s already in B.
        backend: which kernels run.
    """

    bases: tuple[nn.Linear, ...]
    scalings: tuple[float, ...]
    factors: list[Tensor | None]
    backend: str

    @classmethod
    def of(
        cls, layers: Sequence[tuple[nn.Linear, float]], factors: Factors, dtype: torch.dtype, backend: str
    ) -> SharedProduct:
        """From (base, scaling) of each layer and its A and B in float32."""
        made: list[Tensor | None] = []
        for (_, scaling), a, b in zip(layers, factors[::2], factors[1::2], strict=True):
            made.append(None if a is None else a.detach().to(dtype))
            made.append(None if b is None else (b.detach() * scaling).to(dtype))
        return cls(tuple(base for base, _ in layers), tuple(scaling for _, scaling in layers), made, backend)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """x [M, K] -> of each layer y [M, N], and u = x A^T [M, R], which the backward pass wants."""
        with self._held(x.dtype) as (frozen, offsets):
            widths = [base.out_features for base in self.bases]
            made = products.frozen_product(x, frozen, offsets, widths, self.factors, _table(x), self.backend)
        return made[: len(self.bases)], made[len(self.bases) :]

    def grad_input(self, grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Of each layer the grad of y [M, N] -> grad of x [M, K], and of each layer v = s grad B [M, R]."""
        grads = list(grads)
        with self._held(grads[0].dtype) as (frozen, offsets):
            depth = self.bases[0].in_features
            grad_x, *vs = products.frozen_product_backward(
                grads, frozen, offsets, depth, self.factors, _table(grads[0]), self.backend
            )
        return grad_x, vs

    def grad_adapters(
        self, grads: Sequence[Tensor], x: Tensor, us: Sequence[Tensor], vs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients of A [R, K] and B [N, R] of each layer in turn, float32; None where it has no adapter."""
        made: list[Tensor | None] = [None] * len(self.factors)
        adapted = [i for i in range(len(self.bases)) if self.factors[2 * i] is not None]
        if adapted:
            found = products.adapter_gradients(
                [grads[i] for i in adapted], x, [us[i] for i in adapted], [vs[i] for i in adapted],
                [self.scalings[i] for i in adapted], self.backend,
            )  # fmt: skip
            for place, i in enumerate(adapted):
                made[2 * i : 2 * i + 2] = found[2 * place : 2 * place + 2]
        return made

    @contextmanager
    def _held(self, dtype: torch.dtype) -> Iterator[tuple[list[Tensor | None], list[float]]]:
        """The frozen tensors as the operators take them; valid inside."""
        frozen: list[Tensor | None] = []
        offsets: list[float] = []
        for base in self.bases:
            offset = 0.0
            stored = base.lease.acquire_stored(base) if isinstance(base, QuantisedLinear) else None
            if stored is not None:
                frozen += [stored.codes, stored.absmax, stored.nested_absmax]
                offset = stored.offset
            elif isinstance(base, QuantisedLinear):
                frozen += [base.lease.acquire(base, dtype), None, None]
            else:
                frozen += [base.weight.detach().to(dtype), None, None]
            frozen.append(None if base.bias is None else base.bias.detach().to(dtype))
            offsets.append(offset)
        try:
            yield frozen, offsets
        finally:
            for base in self.bases:
                if isinstance(base, QuantisedLinear):
                    base.lease.release(base)


def _table(like: Tensor) -> Tensor:
    return DYNAMIC_MAP.to(like.device)
