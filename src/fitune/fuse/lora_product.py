"""Frozen linear layers of one input with their LoRA updates as plain arithmetic, without autograd.

y = x W^T + b + s (x A^T) B^T for each of them. The fused modules are made of these; W is reached through its lease,
and stays in its 4 bits where the kernels decode it on the way. Where the layers have forms for it (int8_form.py),
the products with W are computed in 8-bit integers; the adapters' parts are floating point always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fitune.fuse.int8_form import ColumnPeaks, Int8Form, forms_of, peaks_of
from fitune.kernels import int8_products, products
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
        forms: of each layer, for products in integers; empty for floating point.
        peaks: is told of the inputs; None: nobody asks.
        adds_bias: whether the layers' biases are part of y.
    """

    bases: tuple[nn.Linear, ...]
    scalings: tuple[float, ...]
    factors: list[Tensor | None]
    backend: str
    forms: tuple[Int8Form, ...] = ()
    peaks: ColumnPeaks | None = None
    adds_bias: bool = True

    @classmethod
    def of(
        cls, layers: Sequence[tuple[nn.Linear, float]], factors: Factors, dtype: torch.dtype, backend: str,
        adds_bias: bool = True,
    ) -> SharedProduct:  # fmt: skip
        """From (base, scaling) of each layer and its A and B in float32."""
        made: list[Tensor | None] = []
        for (_, scaling), a, b in zip(layers, factors[::2], factors[1::2], strict=True):
            made.append(None if a is None else a.detach().to(dtype))
            made.append(None if b is None else (b.detach() * scaling).to(dtype))
        bases, scalings = tuple(base for base, _ in layers), tuple(scaling for _, scaling in layers)
        return cls(bases, scalings, made, backend, forms_of(bases), peaks_of(bases), adds_bias)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """x [M, K] -> of each layer y [M, N], and u = x A^T [M, R], which the backward pass wants."""
        if self.peaks is not None:
            self.peaks.note(self.bases, x)
        with self.held(x.dtype) as (frozen, offsets):
            if self.forms and self.forms[0].forward:
                scales, columns = [form.scales for form in self.forms], [form.columns for form in self.forms]
                made = int8_products.int8_product(
                    x, frozen, offsets, scales, columns, self.forms[0].outliers, self.factors, _table(x),
                    int8_products.BLOCK, self.backend,
                )  # fmt: skip
            else:
                widths = [base.out_features for base in self.bases]
                made = products.frozen_product(x, frozen, offsets, widths, self.factors, _table(x), self.backend)
        return made[: len(self.bases)], made[len(self.bases) :]

    def grad_input(self, grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Of each layer the grad of y [M, N] -> grad of x [M, K], and of each layer v = s grad B [M, R]."""
        grads = list(grads)
        with self.held(grads[0].dtype) as (frozen, offsets):
            depth = self.bases[0].in_features
            if self.forms and self.forms[0].backward:
                scales = [form.scales for form in self.forms]
                grad_x, *vs = int8_products.int8_product_backward(
                    grads, frozen, offsets, scales, depth, self.factors, _table(grads[0]), int8_products.BLOCK,
                    self.backend,
                )  # fmt: skip
            else:
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
    def held(self, dtype: torch.dtype) -> Iterator[tuple[list[Tensor | None], list[float]]]:
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
            frozen.append(base.bias.detach().to(dtype) if self.adds_bias and base.bias is not None else None)
            offsets.append(offset)
        try:
            yield frozen, offsets
        finally:
            for base in self.bases:
                if isinstance(base, QuantisedLinear):
                    base.lease.release(base)


def _table(like: Tensor) -> Tensor:
    return DYNAMIC_MAP.to(like.device)
