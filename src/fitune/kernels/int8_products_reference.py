"""What the products in 8-bit integers mean, in plain torch: recode both sides, multiply exactly, scale and add.

`decoder` says which kernels decode NF4 ("native" or "reference"); the rest is torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fitune.kernels import products_reference

STEP = 64  # blocks of depth are multiples of it
LEAST_PEAK = 1e-30  # values that are all smaller are zeros
EXACT_DEPTH = 1024  # 1024 * 127 * 127 < 2^24: float32 holds such sums of integers exactly, in any order


def _scale(peak: Tensor) -> Tensor:
    """The largest magnitudes -> scales: NaN where they are not finite."""
    scale = torch.where(peak < LEAST_PEAK, 0.0, peak / torch.full_like(peak, 127))
    return torch.where(peak.isfinite(), scale, torch.nan)


def bounds(depth: int, block: int) -> list[tuple[int, int]]:
    """The blocks of depth that have a scale of their own: of nearly equal length, in steps of 64."""
    if block < 0 or block % STEP:
        raise ValueError(f"blocks of {block} values; they are multiples of {STEP}, or 0 for the whole depth")
    steps = -(-depth // STEP)
    count = -(-steps // (block // STEP)) if block else 1
    return [(steps * i // count * STEP, min(depth, steps * (i + 1) // count * STEP)) for i in range(count)]


def code_rows(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """values [M, K] float32 -> integers [M, K] (as float32), and the scales [M, blocks]; NaN where not finite."""
    codes, scales = torch.empty_like(values), []
    for start, stop in bounds(values.shape[1], block):
        part = values[:, start:stop]
        peak = torch.where(part.isfinite(), part.abs(), torch.inf).amax(1)
        scale = _scale(peak)
        inverse = torch.where(scale > 0, torch.full_like(peak, 127) / peak, 0.0)
        # exact in float64, so that it is rounded once
        codes[:, start:stop] = torch.round(part.double() * inverse.double()[:, None]).nan_to_num(0, 0, 0).float()
        scales.append(scale)
    return codes, torch.stack(scales, 1)


def code_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """weight [N, K] float32, scales [N] -> integers (as float32)."""
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return torch.round(weight * inverse[:, None]).nan_to_num(0, 0, 0)


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """Integers [M, K] times [K, N] -> their exact sums, in float32 or float64."""
    if left.shape[1] <= EXACT_DEPTH:
        return torch.mm(left, right)
    return torch.mm(left.double(), right.double())


def scaled_product(codes: Tensor, scales: Tensor, right: Tensor, block: int) -> Tensor:
    """Integers [M, K] with scales [M, blocks] times integers [K, N] -> float32, a block after the other."""
    total = torch.zeros(codes.shape[0], right.shape[1], device=codes.device)
    for i, (start, stop) in enumerate(bounds(codes.shape[1], block)):
        sums = exact_product(codes[:, start:stop], right[start:stop])
        total += (sums * scales[:, i : i + 1]).float()
    return total


def _weight(
    frozen: list[Tensor | None], segment: int, offset: float, shape: list[int], table: Tensor, decoder: str
) -> Tensor:
    return products_reference.dense(frozen, segment, offset, shape, torch.float32, table, decoder)


def int8_row_scales(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, offset: float, width: int, depth: int,
    table: Tensor, decoder: str = "reference",
) -> Tensor:  # fmt: skip
    found = _weight([weight, absmax, nested_absmax], 0, offset, [width, depth], table, decoder)
    if depth == 0:
        return found.new_zeros(width)
    return _scale(torch.where(found.isfinite(), found.abs(), torch.inf).amax(1))


def int8_outlier_columns(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, offset: float, width: int, depth: int,
    outliers: Tensor, table: Tensor, decoder: str = "reference",
) -> Tensor:  # fmt: skip
    found = _weight([weight, absmax, nested_absmax], 0, offset, [width, depth], table, decoder)
    return found[:, outliers.long()].to(torch.bfloat16)


def int8_product(
    x: Tensor, frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], columns: list[Tensor],
    outliers: Tensor, factors: list[Tensor | None], table: Tensor, block: int, decoder: str = "reference",
) -> list[Tensor]:  # fmt: skip
    apart = outliers.long()
    left = x.float().index_fill(1, apart, 0.0)
    codes, row_scales = code_rows(left, block)
    outlying = x[:, apart].float()
    ys, us = [], []
    for i, scale in enumerate(scales):
        weight = _weight(frozen, i, offsets[i], [scale.shape[0], x.shape[1]], table, decoder)
        bias, a, b = frozen[4 * i + 3], factors[2 * i], factors[2 * i + 1]
        y = scaled_product(codes, row_scales, code_weight(weight, scale).t(), block) * scale
        if apart.numel():
            y = torch.addmm(y, outlying, columns[i].float().t())
        u = x.new_empty(x.shape[0], 0) if a is None else torch.mm(x, a.t())
        if b is not None:
            y = torch.addmm(y, u.float(), b.float().t())
        ys.append((y if bias is None else y + bias.float()).to(x.dtype))
        us.append(u)
    return [*ys, *us]


def int8_product_backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], depth: int,
    factors: list[Tensor | None], table: Tensor, block: int, decoder: str = "reference",
) -> list[Tensor]:  # fmt: skip
    into = grads[0].new_zeros(grads[0].shape[0], depth)
    return [into, *int8_product_backward_(grads, frozen, offsets, scales, into, factors, table, block, decoder)]


def int8_product_backward_(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], into: Tensor,
    factors: list[Tensor | None], table: Tensor, block: int, decoder: str = "reference",
) -> list[Tensor]:  # fmt: skip
    total, vs = torch.zeros(into.shape, device=into.device), []
    for i, (grad, scale) in enumerate(zip(grads, scales, strict=True)):
        weight = _weight(frozen, i, offsets[i], [grad.shape[1], into.shape[1]], table, decoder)
        a, b = factors[2 * i], factors[2 * i + 1]
        # the weight's scales go into the gradient, so that one recoding of the weight serves both passes
        codes, row_scales = code_rows(grad.float() * scale, block)
        total += scaled_product(codes, row_scales, code_weight(weight, scale), block)
        v = grad.new_empty(grad.shape[0], 0) if b is None else torch.mm(grad, b)
        if a is not None:
            total = torch.addmm(total, v.float(), a.float())
        vs.append(v)
    into.copy_(into.float() + total)
    return vs
