"""Calling the native products with frozen weights (csrc/product*.inc) on torch tensors."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

import torch
from torch import Tensor

from fitune.kernels import native
from fitune.kernels.rooms import empty
from fitune.kernels.segments import MOST_SEGMENTS, address, check_gradient, ranks, rows_of, scratch, segments

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
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
    if not native.status().available:
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


def frozen_product(
    x: Tensor, frozen: list[Tensor | None], offsets: list[float], widths: list[int], factors: list[Tensor | None],
    table: Tensor,
) -> list[Tensor]:  # fmt: skip
    functions = _products()
    assert functions is not None
    rows, depth = x.shape
    x = rows_of(x, rows, depth)
    factors = [None if factor is None else factor.contiguous() for factor in factors]
    made = [empty((rows, size), torch.bfloat16) for size in (*widths, *ranks(factors))]
    count = len(widths)
    layers = segments(frozen, offsets, factors, depth, made[:count], made[count:])
    threads = torch.get_num_threads()
    functions.forward(
        x.data_ptr(), x.stride(0), rows, depth, layers, count, address(table, torch.float32, 256),
        scratch.of(functions.workspace_bytes(layers, count, rows, depth, 0, threads)), threads,
    )  # fmt: skip
    return made


def _backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], into: Tensor, accumulate: int,
    factors: list[Tensor | None], table: Tensor,
) -> list[Tensor]:  # fmt: skip
    functions = _products()
    assert functions is not None
    rows, depth = into.shape
    grads = [rows_of(grad, rows, grad.shape[1]) for grad in grads]
    factors = [None if factor is None else factor.contiguous() for factor in factors]
    vs = [empty((rows, rank), torch.bfloat16) for rank in ranks(factors)]
    layers = segments(frozen, offsets, factors, depth, grads, vs)
    threads, count = torch.get_num_threads(), len(grads)
    functions.backward(
        rows, depth, layers, count, address(table, torch.float32, 256), into.data_ptr(), into.stride(0),
        native.KINDS[into.dtype], accumulate,
        scratch.of(functions.workspace_bytes(layers, count, rows, depth, 1, threads)), threads,
    )  # fmt: skip
    return vs


def frozen_product_backward(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], depth: int,
    factors: list[Tensor | None], table: Tensor,
) -> list[Tensor]:  # fmt: skip
    into = empty((grads[0].shape[0], depth), torch.bfloat16)
    return [into, *_backward(grads, frozen, offsets, into, 0, factors, table)]


def frozen_product_backward_(
    grads: list[Tensor], frozen: list[Tensor | None], offsets: list[float], into: Tensor,
    factors: list[Tensor | None], table: Tensor,
) -> list[Tensor]:  # fmt: skip
    check_gradient(into)
    return _backward(grads, frozen, offsets, into, 1, factors, table)


def _gradients(
    grads: list[Tensor], x: Tensor, into: list[Tensor], us: list[Tensor], vs: list[Tensor], scalings: list[float],
    accumulate: int,
) -> None:  # fmt: skip
    functions = _products()
    assert functions is not None
    rows, depth = x.shape
    x = rows_of(x, rows, depth)
    # A's gradients first: they share x. What is made contiguous must live until the call is over.
    grads = [rows_of(grad, rows, grad.shape[1]) for grad in grads]
    us, vs = ([rows_of(tensor, rows, tensor.shape[1]) for tensor in some] for some in (us, vs))
    if not len(grads) == len(us) == len(vs) == len(scalings) or len(grads) > MOST_SEGMENTS:
        raise ValueError(f"adapter gradients of {len(grads)} grads, {len(us)} us, {len(vs)} vs")
    made = []
    for v, target in zip(vs, into[::2], strict=True):
        rank = v.shape[1]
        out = address(target, torch.float32, rank * depth)
        made.append(
            _GRADIENT.pack(v.data_ptr(), x.data_ptr(), v.stride(0), x.stride(0), rank, depth, 1.0, out, 0, accumulate)
        )
    for grad, u, scaling, target in zip(grads, us, scalings, into[1::2], strict=True):
        rank, width = u.shape[1], grad.shape[1]
        out = address(target, torch.float32, rank * width)
        made.append(
            _GRADIENT.pack(
                u.data_ptr(), grad.data_ptr(), u.stride(0), grad.stride(0), rank, width, scaling, out, 1, accumulate
            )
        )
    entries, threads = b"".join(made), torch.get_num_threads()
    functions.adapter_gradients(
        entries, len(made), rows,
        scratch.of(functions.gradient_workspace_bytes(entries, len(made), rows, threads)), threads,
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
