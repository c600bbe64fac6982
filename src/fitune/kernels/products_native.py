"""Calling the native products with frozen weights (csrc/product*.inc) on torch tensors.

The descriptors of the C interface are packed as bytes in one go: a call of three layers with adapters costs some
35 us of Python.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from typing import Any

import torch
from torch import Tensor

from fitune.kernels import native

_ABI = 4  # of the library that has these products
_MOST_SEGMENTS = 16
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
# FituneSegment: weight, absmax_codes, nested_absmax, offset, bias, a, b, n, r, y, y_stride, u
_SEGMENT = struct.Struct("=qqqdqqqqqqqq")
# FituneAdapterGradient: p, q, p_stride, q_stride, r, c, scale, out, transposed, accumulate
_GRADIENT = struct.Struct("=qqqqqqdqqq")


class _Products(ctypes.Structure):
    _fields_ = [
        ("workspace_bytes", ctypes.CFUNCTYPE(_L, _P, _L, _L, _L, _I, _I)),
        ("forward", ctypes.CFUNCTYPE(None, _P, _L, _L, _L, _P, _L, _P, _P, _I)),
        ("backward", ctypes.CFUNCTYPE(None, _L, _L, _P, _L, _P, _P, _L, _I, _I, _P, _I)),
        ("gradient_workspace_bytes", ctypes.CFUNCTYPE(_L, _P, _L, _L, _I)),
        ("adapter_gradients", ctypes.CFUNCTYPE(None, _P, _L, _L, _P, _I)),
    ]


class _Table(native._Table):
    _fields_ = (("products", ctypes.POINTER(_Products)),)  # type: ignore[assignment]


@functools.cache
def _products() -> _Products | None:
    """The functions; None where the library or its instruction set has none."""
    if native.ABI < _ABI or not native.status().available:
        return None
    table = ctypes.cast(ctypes.pointer(native._table()), ctypes.POINTER(_Table)).contents
    return table.products.contents if table.products else None


def available() -> bool:
    """Whether the chosen instruction set has dot products of bfloat16."""
    return _products() is not None


def takes(first: Any, *rest: Any) -> bool:
    """Whether the operators' arguments are products that are done natively: bfloat16 with some depth and width."""
    tensor = first if isinstance(first, Tensor) else first[0]
    return tensor.dtype == torch.bfloat16 and tensor.shape[1] > 0 and _products() is not None


class _Scratch(threading.local):
    """A thread's workspace, kept between calls: fresh memory would cost a page fault every 4 KiB."""

    def __init__(self) -> None:
        self.room = torch.empty(0, dtype=torch.uint8)

    def of(self, size_bytes: int) -> int:
        if self.room.numel() < size_bytes:
            self.room = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self.room = torch.empty(size_bytes, dtype=torch.uint8)
        return self.room.data_ptr()


_scratch = _Scratch()


def _rows(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """A bfloat16 matrix of this shape on the CPU whose rows are contiguous."""
    if not tensor.is_cpu or tensor.dtype != torch.bfloat16:
        raise ValueError(f"a native product got a tensor of {tensor.dtype} on {tensor.device}")
    if tensor.shape != (rows, columns):
        raise ValueError(f"a native product got {tuple(tensor.shape)} where it reads {(rows, columns)}")
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _address(tensor: Tensor | None, dtype: torch.dtype, count: int) -> int:
    """Of a contiguous CPU tensor with so many elements; native code trusts what it is told."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"a native product got {tensor.dtype} {tuple(tensor.shape)} where it reads {count} {dtype}")
    return tensor.data_ptr()


def _segments(
    frozen: list[Tensor | None], offsets: list[float], factors: list[Tensor | None], depth: int, ys: list[Tensor],
    us: list[Tensor],
) -> bytes:  # fmt: skip
    count = len(offsets)
    if not len(frozen) == 4 * count == 2 * len(factors) == 4 * len(ys) or not 0 < count <= _MOST_SEGMENTS:
        raise ValueError(f"{len(frozen)} frozen tensors, {len(factors)} factors, {len(ys)} results, {count} segments")
    made = []
    for i, offset in enumerate(offsets):
        weight, absmax, nested, bias = frozen[4 * i : 4 * i + 4]
        a, b = factors[2 * i : 2 * i + 2]
        y, u = ys[i], us[i]
        n, r = y.shape[1], u.shape[1]
        assert weight is not None
        if absmax is None:
            where = _address(weight, torch.bfloat16, n * depth)
        else:
            where = _address(weight, torch.uint8, (n * depth + 1) // 2)
        blocks = -(-n * depth // 64)
        made.append(
            _SEGMENT.pack(
                where, _address(absmax, torch.uint8, blocks), _address(nested, torch.float32, -(-blocks // 256)),
                offset, _address(bias, torch.bfloat16, n), _address(a, torch.bfloat16, r * depth),
                _address(b, torch.bfloat16, n * r), n, r, y.data_ptr(), y.stride(0), u.data_ptr(),
            )
        )  # fmt: skip
    return b"".join(made)


def _ranks(factors: list[Tensor | None]) -> list[int]:
    return [0 if a is None else a.shape[0] for a in factors[::2]]


def frozen_product(
    x: Tensor, frozen: list[Tensor | None], offsets: list[float], widths: list[int], factors: list[Tensor | None],
    table: Tensor,
) -> list[Tensor]:  # fmt: skip
    functions = _products()
    assert functions is not None
    rows, depth = x.shape
    x = _rows(x, rows, depth)
    factors = [None if factor is None else factor.contiguous() for factor in factors]
    made = [torch.empty(rows, size, dtype=torch.bfloat16) for size in (*widths, *_ranks(factors))]
    count = len(widths)
    segments = _segments(frozen, offsets, factors, depth, made[:count], made[count:])
    threads = torch.get_num_threads()
    functions.forward(
        x.data_ptr(), x.stride(0), rows, depth, segments, count, _address(table, torch.float32, 256),
        _scratch.of(functions.workspace_bytes(segments, count, rows, depth, 0, threads)), threads,
    )  # fmt: skip
    return made


def _backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], into: Tensor, accumulate: int,
    factors: list[Tensor | None], table: Tensor,
) -> list[Tensor]:  # fmt: skip
    functions = _products()
    assert functions is not None
    rows, depth = into.shape
    grads = [_rows(grad, rows, grad.shape[1]) for grad in grads]
    factors = [None if factor is None else factor.contiguous() for factor in factors]
    vs = [torch.empty(rows, rank, dtype=torch.bfloat16) for rank in _ranks(factors)]
    segments = _segments(frozen, offsets, factors, depth, grads, vs)
    threads, count = torch.get_num_threads(), len(grads)
    functions.backward(
        rows, depth, segments, count, _address(table, torch.float32, 256), into.data_ptr(), into.stride(0),
        native.KINDS[into.dtype], accumulate,
        _scratch.of(functions.workspace_bytes(segments, count, rows, depth, 1, threads)), threads,
    )  # fmt: skip
    return vs


def frozen_product_backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], depth: int,
    factors: list[Tensor | None], table: Tensor,
) -> list[Tensor]:  # fmt: skip
    into = torch.empty(grads[0].shape[0], depth, dtype=torch.bfloat16)
    return [into, *_backward(grads, frozen, offsets, into, 0, factors, table)]


def frozen_product_backward_(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], into: Tensor,
    factors: list[Tensor | None], table: Tensor,
) -> list[Tensor]:  # fmt: skip
    if into.dtype not in (torch.float32, torch.bfloat16) or into.stride(1) != 1 or not into.is_cpu:
        raise ValueError(f"a gradient cannot be added to {into.dtype} with strides {into.stride()} on {into.device}")
    return _backward(grads, frozen, offsets, into, 1, factors, table)


def _gradients(
    grads: list[Tensor], x: Tensor, into: list[Tensor], us: list[Tensor], vs: list[Tensor], scalings: list[float],
    accumulate: int,
) -> None:  # fmt: skip
    functions = _products()
    assert functions is not None
    rows, depth = x.shape
    x = _rows(x, rows, depth)
    # A's gradients first: they share x. What is made contiguous must live until the call is over.
    grads = [_rows(grad, rows, grad.shape[1]) for grad in grads]
    us, vs = ([_rows(tensor, rows, tensor.shape[1]) for tensor in some] for some in (us, vs))
    if not len(grads) == len(us) == len(vs) == len(scalings) or len(grads) > _MOST_SEGMENTS:
        raise ValueError(f"adapter gradients of {len(grads)} grads, {len(us)} us, {len(vs)} vs")
    made = []
    for v, target in zip(vs, into[::2], strict=True):
        rank = v.shape[1]
        out = _address(target, torch.float32, rank * depth)
        made.append(
            _GRADIENT.pack(v.data_ptr(), x.data_ptr(), v.stride(0), x.stride(0), rank, depth, 1.0, out, 0, accumulate)
        )
    for grad, u, scaling, target in zip(grads, us, scalings, into[1::2], strict=True):
        rank, width = u.shape[1], grad.shape[1]
        out = _address(target, torch.float32, rank * width)
        made.append(
            _GRADIENT.pack(
                u.data_ptr(), grad.data_ptr(), u.stride(0), grad.stride(0), rank, width, scaling, out, 1, accumulate
            )
        )
    entries, threads = b"".join(made), torch.get_num_threads()
    functions.adapter_gradients(
        entries, len(made), rows,
        _scratch.of(functions.gradient_workspace_bytes(entries, len(made), rows, threads)), threads,
    )  # fmt: skip


def adapter_gradients(
    grads: list[Tensor], x: Tensor, us: list[Tensor], vs: list[Tensor], scalings: list[float]
) -> list[Tensor]:
    into = []
    for grad, u in zip(grads, us, strict=True):
        into.append(torch.empty(u.shape[1], x.shape[1], dtype=torch.float32))
        into.append(torch.empty(grad.shape[1], u.shape[1], dtype=torch.float32))
    _gradients(grads, x, into, us, vs, scalings, 0)
    return into


def adapter_gradients_(
    grads: list[Tensor], x: Tensor, into: list[Tensor], us: list[Tensor], vs: list[Tensor], scalings: list[float]
) -> None:
    _gradients(grads, x, into, us, vs, scalings, 1)
