"""What the products with frozen weights mean, in plain torch: decode the weight, multiply, add the adapter's part.

`decoder` says which kernels decode NF4 ("native" or "reference"); the products are torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fitune.kernels import native, reference

_DECODERS = {"native": native.nf4_dequantise, "reference": reference.nf4_dequantise}


def dense(
    frozen: list[Tensor | None], segment: int, offset: float, shape: list[int], dtype: torch.dtype, table: Tensor,
    decoder: str,
) -> Tensor:  # fmt: skip
    """The weight [N, K] of a segment."""
    weight, absmax, nested = frozen[4 * segment : 4 * segment + 3]
    assert weight is not None
    if absmax is None or nested is None:
        return weight.to(dtype)
    return _DECODERS[decoder](weight, absmax, nested, table, offset, shape, dtype)


def frozen_product(
    x: Tensor, frozen: list[Tensor | None], offsets: list[float], widths: list[int], factors: list[Tensor | None],
    table: Tensor, decoder: str = "reference",
) -> list[Tensor]:  # fmt: skip
    ys, us = [], []
    for i, width in enumerate(widths):
        weight = dense(frozen, i, offsets[i], [width, x.shape[1]], x.dtype, table, decoder)
        bias, a, b = frozen[4 * i + 3], factors[2 * i], factors[2 * i + 1]
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())
        del weight  # before the next one is decoded
        u = x.new_empty(x.shape[0], 0) if a is None else torch.mm(x, a.t())
        ys.append(y if b is None else y.addmm_(u, b.t()))
        us.append(u)
    return [*ys, *us]


def frozen_product_backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], depth: int,
    factors: list[Tensor | None], table: Tensor, decoder: str = "reference",
) -> list[Tensor]:  # fmt: skip
    into = grads[0].new_zeros(grads[0].shape[0], depth)
    return [into, *frozen_product_backward_(grads, frozen, offsets, into, factors, table, decoder)]


def frozen_product_backward_(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], into: Tensor,
    factors: list[Tensor | None], table: Tensor, decoder: str = "reference",
) -> list[Tensor]:  # fmt: skip
    vs = []
    for i, grad in enumerate(grads):
        weight = dense(frozen, i, offsets[i], [grad.shape[1], into.shape[1]], grad.dtype, table, decoder)
        a, b = factors[2 * i], factors[2 * i + 1]
        v = grad.new_empty(grad.shape[0], 0) if b is None else torch.mm(grad, b)
        for left, right in ((grad, weight), (v, a)):
            if right is None:
                continue
            if into.dtype == grad.dtype:
                into.addmm_(left, right)
            else:
                into.add_(torch.mm(left, right))
        del weight, left, right
        vs.append(v)
    return vs


def adapter_gradients(
    grads: list[Tensor], x: Tensor, us: list[Tensor], vs: list[Tensor], scalings: list[float], decoder: str = ""
) -> list[Tensor]:
    made = []
    for grad, u, v, scaling in zip(grads, us, vs, scalings, strict=True):
        made.append(torch.mm(v.t(), x).float())
        made.append(torch.mm(grad.t(), u).float().mul_(scaling))
    return made


def adapter_gradients_(
    grads: list[Tensor], x: Tensor, into: list[Tensor], us: list[Tensor], vs: list[Tensor], scalings: list[float],
    decoder: str = "",
) -> None:  # fmt: skip
    for target, found in zip(into, adapter_gradients(grads, x, us, vs, scalings), strict=True):
        target.add_(found)
