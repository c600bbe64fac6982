"""Products of frozen weights with their adapters, of several layers that share an input: schema and fakes.

A segment is one linear layer: y = x W^T + bias + (x A^T) B^T, the adapter's scaling already in B. Its frozen
tensors come as four (`frozen`): weight (NF4 codes, or bfloat16 [N, K]), block maxima (8-bit codes) and their scales
(both None for a dense weight), bias [N] (or None); its adapter as two (`factors`): A [R, K] and B [N, R], both None
where there is none. All of a call's segments lie one after the other in these lists.

`backend` is "native" (csrc, CPU) or "reference" (plain torch, any device). "native" takes bfloat16 on machines that
have dot products of it (`natively_multiplied`); for the rest it decodes with the native kernels and multiplies with
torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fitune.kernels import products_native, products_reference
from fitune.kernels.registration import native_where_taken
from fitune.kernels.segments import ranks

_operator = native_where_taken(products_native, products_reference)
_FROZEN = "Tensor?[] frozen, float[] offsets"


def natively_multiplied(dtype: torch.dtype) -> bool:
    """Whether "native" multiplies in this dtype itself, instead of decoding and calling torch."""
    return dtype == torch.bfloat16 and products_native.available()


@_operator(
    f"frozen_product(Tensor x, {_FROZEN}, int[] widths, Tensor?[] factors, Tensor table, str backend) -> Tensor[]"
)
def frozen_product(
    x: Tensor, frozen: list[Tensor | None], offsets: list[float], widths: list[int], factors: list[Tensor | None],
    table: Tensor,
) -> Any:  # fmt: skip
    """x [M, K] -> every segment's y [M, N], then every segment's u = x A^T [M, R] (R 0 where it has no adapter)."""
    sizes = [*widths, *ranks(factors)]
    return [x.new_empty(x.shape[0], size) for size in sizes]


@_operator(
    f"frozen_product_backward(Tensor[] grads, {_FROZEN}, int depth, Tensor?[] factors, Tensor table, str backend) "
    "-> Tensor[]"
)
def frozen_product_backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], depth: int,
    factors: list[Tensor | None], table: Tensor,
) -> Any:  # fmt: skip
    """Every segment's grad of y [M, N] -> grad of x [M, depth], then every segment's v = grad B [M, R]."""
    sizes = [depth, *ranks(factors)]
    return [grads[0].new_empty(grads[0].shape[0], size) for size in sizes]


@_operator(
    f"frozen_product_backward_(Tensor[] grads, {_FROZEN}, Tensor(a!) into, Tensor?[] factors, Tensor table, "
    "str backend) -> Tensor[]"
)
def frozen_product_backward_(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], into: Tensor,
    factors: list[Tensor | None], table: Tensor,
) -> Any:  # fmt: skip
    """The same, added to `into` [M, K] (float32, or the grads' dtype); returns every segment's v."""
    return [grads[0].new_empty(grads[0].shape[0], size) for size in ranks(factors)]


@_operator(
    "adapter_gradients(Tensor[] grads, Tensor x, Tensor[] us, Tensor[] vs, float[] scalings, str backend) -> Tensor[]"
)
def adapter_gradients(
    grads: list[Tensor], x: Tensor, us: list[Tensor], vs: list[Tensor], scalings: list[float]
) -> Any:
    """For every segment the float32 gradients of A [R, K] = v^T x and of B [N, R] = scaling * grad^T u."""
    made = []
    for grad, u in zip(grads, us, strict=True):
        made.append(x.new_empty(u.shape[1], x.shape[1], dtype=torch.float32))
        made.append(x.new_empty(grad.shape[1], u.shape[1], dtype=torch.float32))
    return made


@_operator(
    "adapter_gradients_(Tensor[] grads, Tensor x, Tensor(a!)[] into, Tensor[] us, Tensor[] vs, float[] scalings, "
    "str backend) -> ()"
)
def adapter_gradients_(
    grads: list[Tensor], x: Tensor, into: list[Tensor], us: list[Tensor], vs: list[Tensor], scalings: list[float]
) -> None:
    """The same, added to float32 `into`: A's and B's gradient of every segment in turn."""
