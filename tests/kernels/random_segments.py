"""Frozen layers with adapters of any shape, drawn at random, as the operators of products take them."""

from __future__ import annotations

import torch
from test_native import random
from torch import Tensor

from fitune.kernels import products_reference
from fitune.quant import nf4

BF16 = torch.bfloat16


class RandomSegments:
    def __init__(self, depth: int, widths: list[int], ranks: list[int], seed: int = 0, dense: tuple[int, ...] = (),
                 biased: tuple[int, ...] = ()) -> None:  # fmt: skip
        self.depth, self.widths, self.ranks = depth, widths, ranks
        self.frozen: list[Tensor | None] = []
        self.offsets: list[float] = []
        self.factors: list[Tensor | None] = []
        for i, (width, rank) in enumerate(zip(widths, ranks, strict=True)):
            weight = random(width, depth, seed=seed + 10 * i + 1, scale=depth**-0.5)
            bias = random(width, dtype=BF16, seed=seed + 10 * i + 2) if i in biased else None
            if i in dense:
                self.frozen += [weight.to(BF16), None, None, bias]
                self.offsets.append(0.0)
            else:
                stored = nf4.quantise(weight, "native")
                self.frozen += [stored.codes, stored.absmax, stored.nested_absmax, bias]
                self.offsets.append(stored.offset)
            a, b = random(rank, depth, seed=seed + 10 * i + 3), random(width, rank, seed=seed + 10 * i + 4)
            pair = [(a * depth**-0.5).to(BF16), (b * max(rank, 1) ** -0.5).to(BF16)]
            self.factors += pair if rank else [None, None]

    def weight(self, i: int, dtype: torch.dtype = BF16) -> Tensor:
        """As the reference decodes it."""
        shape = [self.widths[i], self.depth]
        return products_reference.dense(self.frozen, i, self.offsets[i], shape, dtype, nf4.DYNAMIC_MAP, "reference")

    def grads(self, rows: int, seed: int) -> list[Tensor]:
        """Of the results."""
        return [random(rows, width, dtype=BF16, seed=seed + i) for i, width in enumerate(self.widths)]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
