"""Linear layers as the native products take them: the descriptors of the C interface, checked and packed as bytes.

A segment is one layer (products.py says what it consists of). All descriptors of a call are packed in one go: a call
of three layers with adapters costs some 35 us of Python.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_SEGMENTS = 16
# FituneSegment: weight, absmax_codes, nested_absmax, offset, bias, a, b, n, r, y, y_stride, u
_SEGMENT = struct.Struct("=qqqdqqqqqqqq")


class Scratch(threading.local):
    """A thread's workspace, kept between calls: fresh memory would cost a page fault every 4 KiB."""

    def __init__(self) -> None:
        self.room = torch.empty(0, dtype=torch.uint8)

    def of(self, size_bytes: int) -> int:
        if self.room.numel() < size_bytes:
            self.room = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self.room = torch.empty(size_bytes, dtype=torch.uint8)
        return self.room.data_ptr()


scratch = Scratch()


def rows_of(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """A bfloat16 matrix of this shape on the CPU whose rows are contiguous."""
    if not tensor.is_cpu or tensor.dtype != torch.bfloat16:
        raise ValueError(f"a native product got a tensor of {tensor.dtype} on {tensor.device}")
    if tensor.shape != (rows, columns):
        raise ValueError(f"a native product got {tuple(tensor.shape)} where it reads {(rows, columns)}")
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def address(tensor: Tensor | None, dtype: torch.dtype, count: int) -> int:
    """Of a contiguous CPU tensor with so many elements; native code trusts what it is told."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"a native product got {tensor.dtype} {tuple(tensor.shape)} where it reads {count} {dtype}")
    return tensor.data_ptr()


def segments(
    frozen: list[Tensor | None], offsets: list[float], factors: list[Tensor | None], depth: int, ys: list[Tensor],
    us: list[Tensor],
) -> bytes:  # fmt: skip
    """The descriptors of all segments: `ys` are their results (or gradients), `us` their x A^T (or grad B)."""
    count = len(offsets)
    if not len(frozen) == 4 * count == 2 * len(factors) == 4 * len(ys) or not 0 < count <= MOST_SEGMENTS:
        raise ValueError(f"{len(frozen)} frozen tensors, {len(factors)} factors, {len(ys)} results, {count} segments")
    made = []
    for i, offset in enumerate(offsets):
        weight, absmax, nested, bias = frozen[4 * i : 4 * i + 4]
        a, b = factors[2 * i : 2 * i + 2]
        y, u = ys[i], us[i]
        n, r = y.shape[1], u.shape[1]
        assert weight is not None
        if absmax is None:
            where = address(weight, torch.bfloat16, n * depth)
        else:
            where = address(weight, torch.uint8, (n * depth + 1) // 2)
        blocks = -(-n * depth // 64)
        made.append(
            _SEGMENT.pack(
                where, address(absmax, torch.uint8, blocks), address(nested, torch.float32, -(-blocks // 256)),
                offset, address(bias, torch.bfloat16, n), address(a, torch.bfloat16, r * depth),
                address(b, torch.bfloat16, n * r), n, r, y.data_ptr(), y.stride(0), u.data_ptr(),
            )
        )  # fmt: skip
    return b"".join(made)


def ranks(factors: Sequence[Tensor | None]) -> list[int]:
    """Of every segment's adapter; 0 where it has none."""
    return [0 if a is None else a.shape[0] for a in factors[::2]]


def check_gradient(into: Tensor) -> None:
    """That native code can add to it."""
    if into.dtype not in (torch.float32, torch.bfloat16) or into.stride(1) != 1 or not into.is_cpu:
        raise ValueError(f"a gradient cannot be added to {into.dtype} with strides {into.stride()} on {into.device}")
