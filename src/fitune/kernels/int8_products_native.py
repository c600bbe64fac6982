"""Calling the native products in 8-bit integers (csrc/product_int8*.inc) on torch tensors."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

import torch
from torch import Tensor

from fitune.kernels import native, products_native
from fitune.kernels.rooms import empty
from fitune.kernels.segments import address, check_gradient, ranks, rows_of, scratch, segments

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_RECODED = struct.Struct("=qq")  # FituneInt8Segment: scales, outlier_columns


class _Int8Products(ctypes.Structure):
    _fields_ = [
        ("row_scales", ctypes.CFUNCTYPE(None, _P, _L, _P, _P, _I)),
        ("outlier_columns", ctypes.CFUNCTYPE(None, _P, _L, _P, _P, _L, _P, _I)),
        ("workspace_bytes", ctypes.CFUNCTYPE(_L, _P, _L, _L, _L, _L, _L, _I, _I)),
        ("forward", ctypes.CFUNCTYPE(None, _P, _L, _L, _L, _P, _P, _L, _P, _L, _L, _P, _P, _I)),
        ("backward", ctypes.CFUNCTYPE(None, _L, _L, _P, _P, _L, _L, _P, _P, _L, _I, _I, _P, _I)),
    ]


class _Products(products_native._Products):
    _fields_ = (("int8", ctypes.POINTER(_Int8Products)),)  # type: ignore[assignment]


@functools.cache
def _products() -> _Int8Products | None:
    """The functions; None where the library or its instruction set has none."""
    found = products_native._products()
    if found is None:
        return None
    return ctypes.cast(ctypes.pointer(found), ctypes.POINTER(_Products)).contents.int8.contents


def available() -> bool:
    """Whether the chosen instruction set has dot products of 8-bit integers."""
    return _products() is not None


def takes(first: Any, *rest: Any) -> bool:
    """Whether an operator's arguments are done natively: bfloat16 on the CPU with some depth; any weight."""
    if _products() is None:
        return False
    if isinstance(first, Tensor) and (not rest or not isinstance(rest[0], list)):  # a weight
        depth = int(rest[4])
        return depth > 0 and first.is_cpu and (first.dtype == torch.bfloat16 or rest[0] is not None)
    tensor = first if isinstance(first, Tensor) else first[0]
    return tensor.dtype == torch.bfloat16 and tensor.shape[1] > 0


def _checked_block(block: int) -> int:
    if block < 0 or block % 64:
        raise ValueError(f"blocks of {block} values; they are multiples of 64, or 0 for the whole depth")
    return block


def _checked_outliers(outliers: Tensor, depth: int) -> Tensor:
    """int32, increasing, columns of x; native code trusts them."""
    address(outliers, torch.int32, outliers.numel())
    if outliers.numel():
        inside = int(outliers[0]) >= 0 and int(outliers[-1]) < depth
        if not inside or not bool((outliers[1:] > outliers[:-1]).all()):
            raise ValueError(f"outliers are increasing columns of {depth}: {outliers.tolist()}")
    return outliers


def _weight_segment(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, offset: float, width: int, depth: int
) -> bytes:
    nothing = torch.empty(0, width, dtype=torch.bfloat16)
    return segments([weight, absmax, nested_absmax, None], [offset], [None, None], depth, [nothing], [nothing[:, :0]])


def int8_row_scales(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, offset: float, width: int, depth: int,
    table: Tensor,
) -> Tensor:  # fmt: skip
    functions = _products()
    assert functions is not None
    scales = torch.empty(width, dtype=torch.float32)
    segment = _weight_segment(weight, absmax, nested_absmax, offset, width, depth)
    functions.row_scales(
        segment, depth, address(table, torch.float32, 256), scales.data_ptr(), torch.get_num_threads()
    )
    return scales


def int8_outlier_columns(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, offset: float, width: int, depth: int,
    outliers: Tensor, table: Tensor,
) -> Tensor:  # fmt: skip
    functions = _products()
    assert functions is not None
    outliers = _checked_outliers(outliers, depth)
    columns = torch.empty(width, outliers.numel(), dtype=torch.bfloat16)
    segment = _weight_segment(weight, absmax, nested_absmax, offset, width, depth)
    functions.outlier_columns(
        segment, depth, address(table, torch.float32, 256), outliers.data_ptr(), outliers.numel(),
        columns.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return columns


def _recoded(scales: list[Tensor], columns: list[Tensor], widths: list[int], outliers: int) -> bytes:
    """The descriptors; `columns` are not read where there are no outliers."""
    if len(scales) != len(widths) or (outliers and len(columns) != len(widths)):
        raise ValueError(f"scales of {len(scales)} and outlier columns of {len(columns)} layers for {len(widths)}")
    made = []
    for i, (scale, width) in enumerate(zip(scales, widths, strict=True)):
        where = address(columns[i], torch.bfloat16, width * outliers) if outliers else 0
        made.append(_RECODED.pack(address(scale, torch.float32, width), where))
    return b"".join(made)


def int8_product(
    x: Tensor, frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], columns: list[Tensor],
    outliers: Tensor, factors: list[Tensor | None], table: Tensor, block: int,
) -> list[Tensor]:  # fmt: skip
    functions = _products()
    assert functions is not None
    rows, depth = x.shape
    x = rows_of(x, rows, depth)
    outliers = _checked_outliers(outliers, depth)
    factors = [None if factor is None else factor.contiguous() for factor in factors]
    widths = [scale.shape[0] for scale in scales]
    made = [empty((rows, size), torch.bfloat16) for size in (*widths, *ranks(factors))]
    count, apart = len(widths), outliers.numel()
    layers = segments(frozen, offsets, factors, depth, made[:count], made[count:])
    recoded, threads = _recoded(scales, columns, widths, apart), torch.get_num_threads()
    size_bytes = functions.workspace_bytes(layers, count, rows, depth, apart, _checked_block(block), 0, threads)
    functions.forward(
        x.data_ptr(), x.stride(0), rows, depth, layers, recoded, count, outliers.data_ptr(), apart, block,
        address(table, torch.float32, 256), scratch.of(size_bytes), threads,
    )  # fmt: skip
    return made


def _backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], into: Tensor,
    accumulate: int, factors: list[Tensor | None], table: Tensor, block: int,
) -> list[Tensor]:  # fmt: skip
    functions = _products()
    assert functions is not None
    rows, depth = into.shape
    grads = [rows_of(grad, rows, grad.shape[1]) for grad in grads]
    factors = [None if factor is None else factor.contiguous() for factor in factors]
    vs = [empty((rows, rank), torch.bfloat16) for rank in ranks(factors)]
    layers = segments(frozen, offsets, factors, depth, grads, vs)
    recoded = _recoded(scales, [], [grad.shape[1] for grad in grads], 0)
    threads, count = torch.get_num_threads(), len(grads)
    size_bytes = functions.workspace_bytes(layers, count, rows, depth, 0, _checked_block(block), 1, threads)
    functions.backward(
        rows, depth, layers, recoded, count, block, address(table, torch.float32, 256), into.data_ptr(),
        into.stride(0), native.KINDS[into.dtype], accumulate, scratch.of(size_bytes), threads,
    )  # fmt: skip
    return vs


def int8_product_backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], depth: int,
    factors: list[Tensor | None], table: Tensor, block: int,
) -> list[Tensor]:  # fmt: skip
    into = empty((grads[0].shape[0], depth), torch.bfloat16)
    return [into, *_backward(grads, frozen, offsets, scales, into, 0, factors, table, block)]


def int8_product_backward_(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], scales: list[Tensor], into: Tensor,
    factors: list[Tensor | None], table: Tensor, block: int,
) -> list[Tensor]:  # fmt: skip
    check_gradient(into)
    return _backward(grads, frozen, offsets, scales, into, 1, factors, table, block)
