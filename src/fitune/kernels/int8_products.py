"""Products of frozen weights in 8-bit integers, with their adapters in floating point: schema and fakes.

Segments, `frozen` and `factors` are those of products.py. Each row of a weight W [N, K] is recoded to 8-bit integers
with one scale (`int8_row_scales`, kept by the caller), on the way from NF4 or bfloat16. Each row of the activations x
and of the gradients is recoded with one scale for every block of depth: at most `block` values, a multiple of 64, or
0 for the whole depth of a segment. Integers are summed exactly, their sums scaled and added in float32.

`outliers` are columns of x, int32, increasing: they are left out of the integers and multiplied as they are with
W's columns (`int8_outlier_columns`, kept by the caller as well: two bytes for each). The adapters' parts are
products of floating point as in products.py. The gradient of x has no outliers.

`backend` is "native" (csrc, CPU; bfloat16 on machines that have dot products of it and of 8-bit integers) or
"reference" (plain torch, any device). A row with a value that is not finite gives no finite results; a row of W with
such a value gives a column of NaN, and NaN everywhere in the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fitune.kernels import int8_products_native, int8_products_reference
from fitune.kernels.registration import native_where_taken
from fitune.kernels.segments import ranks

BLOCK = 256  # values that share a scale: with 32 outliers a quarter of the error that one scale a row gives
_WEIGHT = "Tensor weight, Tensor? absmax, Tensor? nested_absmax, float offset, int width, int depth"
_operator = native_where_taken(int8_products_native, int8_products_reference)
_FROZEN = "Tensor?[] frozen, float[] offsets, Tensor[] scales"


def natively_multiplied(dtype: torch.dtype) -> bool:
    """Whether "native" multiplies in integers itself for this dtype, instead of plain torch."""
    return dtype == torch.bfloat16 and int8_products_native.available()


@_operator(f"int8_row_scales({_WEIGHT}, Tensor table, str backend) -> Tensor")
def int8_row_scales(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, offset: float, width: int, depth: int,
    table: Tensor,
) -> Tensor:  # fmt: skip
    """A frozen weight -> the scale of each row [N] float32: its largest magnitude / 127."""
    return weight.new_empty(width, dtype=torch.float32)


@_operator(f"int8_outlier_columns({_WEIGHT}, Tensor outliers, Tensor table, str backend) -> Tensor")
def int8_outlier_columns(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, offset: float, width: int, depth: int,
    outliers: Tensor, table: Tensor,
) -> Tensor:  # fmt: skip
    """A frozen weight -> its columns `outliers` [N, outliers] bfloat16."""
    return weight.new_empty(width, outliers.shape[0], dtype=torch.bfloat16)


@_operator(
    f"int8_product(Tensor x, {_FROZEN}, Tensor[] columns, Tensor outliers, Tensor?[] factors, Tensor table, "
    "int block, str backend) -> Tensor[]"
)
def int8_product(
    x: Tensor, frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], columns: list[Tensor],
    outliers: Tensor, factors: list[Tensor | None], table: Tensor, block: int,
) -> Any:  # fmt: skip
    """x [M, K] -> every segment's y [M, N], then every segment's u = x A^T [M, R] (R 0 where it has no adapter).

    `columns` of each segment [N, outliers]; empty where there are no outliers.
    """
    return [x.new_empty(x.shape[0], size) for size in (*(scale.shape[0] for scale in scales), *ranks(factors))]


@_operator(
    f"int8_product_backward(Tensor[] grads, {_FROZEN}, int depth, Tensor?[] factors, Tensor table, int block, "
    "str backend) -> Tensor[]"
)
def int8_product_backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], depth: int,
    factors: list[Tensor | None], table: Tensor, block: int,
) -> Any:  # fmt: skip
    """Every segment's grad of y [M, N] -> grad of x [M, depth], then every segment's v = grad B [M, R]."""
    return [grads[0].new_empty(grads[0].shape[0], size) for size in (depth, *ranks(factors))]


@_operator(
    f"int8_product_backward_(Tensor[] grads, {_FROZEN}, Tensor(a!) into, Tensor?[] factors, Tensor table, int block, "
    "str backend) -> Tensor[]"
)
def int8_product_backward_(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], into: Tensor,
    factors: list[Tensor | None], table: Tensor, block: int,
) -> Any:  # fmt: skip
    """The same, added to `into` [M, K] (float32, or the grads' dtype); returns every segment's v."""
    return [grads[0].new_empty(grads[0].shape[0], size) for size in ranks(factors)]
