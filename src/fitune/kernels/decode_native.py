"""Calling the native step of a whole decoder layer (csrc/decode_layer.cpp) on torch tensors."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fitune.kernels import native, products_native
from fitune.kernels.segments import address

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_NORM = struct.Struct("=qddq")  # FituneNorm: weight, eps, shift, width
# The rest of FituneDecodeLayer: four segment pointers; c, f, heads, kv_heads, d, half, turned_first, activation,
# window; scale, cap, residual; keys, values; capacity
_REST = struct.Struct("=qqqqqqqqqqqqqdddqqq")


@dataclass(frozen=True)
class Norm:
    """A root mean square norm: weight [width] in bfloat16."""

    weight: Tensor
    eps: float
    shift: float


@dataclass(frozen=True)
class DecodeForm:
    """What a layer makes of its products; the names are those of the fused layer's own forms."""

    heads: int
    kv_heads: int
    head_dim: int
    half: int
    turned_first: bool
    activation: str
    window: int
    scale: float
    cap: float
    residual: float


def available() -> bool:
    """Whether the chosen instruction set multiplies bfloat16 itself."""
    return products_native.available()


@functools.cache
def _function() -> Any:
    function = native._load()[2].fitune_decode_layer
    function.restype = None
    function.argtypes = [_P, _P, _P, _L, _P, _P, _P, _L, _P, _P, _I]
    return function


class DecodeLayer:
    """A layer's descriptors, packed once; whatever they point at must stay where it is as long as this is used."""

    def __init__(
        self, norms: Sequence[Norm | None], head_norms: Sequence[Norm | None], segments: Sequence[bytes],
        hidden: int, inner: int, form: DecodeForm, keys: Tensor, values: Tensor, keep: Any,
    ) -> None:  # fmt: skip
        """`norms`: four, `head_norms`: two; `segments`: queries, keys and values; output; gate and up; down.

        `keys`, `values` [slots, K, capacity, D]; `keep`: what must not be freed before this.
        """
        slots, kv_heads, capacity, head_dim = keys.shape
        if (kv_heads, head_dim) != (form.kv_heads, form.head_dim):
            raise ValueError(f"slots {tuple(keys.shape)} for {form}")
        self._segments = [ctypes.create_string_buffer(part, len(part)) for part in segments]
        packed = b"".join(_packed(norm) for norm in (*norms, *head_norms)) + _REST.pack(
            *(ctypes.addressof(part) for part in self._segments), hidden, inner, form.heads, form.kv_heads,
            form.head_dim, form.half, int(form.turned_first), native.ACTIVATIONS[form.activation], form.window,
            form.scale, form.cap, form.residual, address(keys, torch.bfloat16, keys.numel()),
            address(values, torch.bfloat16, keys.numel()), capacity,
        )  # fmt: skip
        self._layer = ctypes.create_string_buffer(packed, len(packed))
        self._keep = (*norms, *head_norms, keys, values, keep)
        self._slots, self._capacity, self._hidden, self._half = slots, capacity, hidden, form.half

    def step(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, columns: Tensor, shared: int, table: Tensor
    ) -> Tensor:
        """x [n, C] bfloat16, one token a row -> [n, C]; its keys and values go to `columns` [n] of the slots.

        cos, sin [n, half] float32. The first `shared` columns are the same in all slots.
        """
        rows = x.shape[0]
        if rows > self._slots:
            raise ValueError(f"{rows} rows in {self._slots} slots")
        if not self._half:
            cos, sin = None, None
        out = torch.empty(rows, self._hidden, dtype=torch.bfloat16)
        _function()(
            ctypes.addressof(native._table()), self._layer, address(x, torch.bfloat16, rows * self._hidden), rows,
            address(cos, torch.float32, rows * self._half), address(sin, torch.float32, rows * self._half),
            address(columns, torch.int64, rows), shared, address(table, torch.float32, 256), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out


def _packed(norm: Norm | None) -> bytes:
    if norm is None:
        return _NORM.pack(0, 0.0, 0.0, 0)
    width = norm.weight.numel()
    return _NORM.pack(address(norm.weight, torch.bfloat16, width), norm.eps, norm.shift, width)
