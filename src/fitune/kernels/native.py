"""The native kernels: finding the shared library, choosing an instruction set, calling it on torch tensors.

The library is plain C (csrc/fitune_kernels.h), loaded with ctypes after torch, so that both use one OpenMP
runtime. It takes its thread count from torch at every call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitune.kernels.rooms import empty

ABI = 8
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOMENT_MAP_WORDS, ADAMW_SETTINGS = 256 + 256 + 65536, 8
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class _Strides(ctypes.Structure):
    _fields_ = [("row", ctypes.c_int64), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_HEADS = (_P, _Strides, _P, _Strides, _P, _Strides, _I, _L, _L, _L, _L, _L, _P, _L, _L, _F, _F)
# The fields of FituneKernels, in order: name -> argument types.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nf4_quantise": (_P, _I, _L, _P, _P, _I),
    "nf4_dequantise": (_P, _P, _P, _P, _F, _L, _P, _I, _I),
    "rms_norm": (_P, _P, _I, _L, _L, _F, _F, _P, _P, _I),
    "rms_norm_backward": (_P, _P, _P, _P, _P, _I, _L, _L, _F, _P, _I),
    "gated_activation": (_P, _P, _I, _I, _L, _P, _I),
    "gated_activation_backward": (_P, _P, _P, _I, _I, _L, _P, _P, _P, _I),
    "token_logprob": (_P, _I, _P, _L, _L, _I, _P, _I),
    "rotate": (_P, _I, _L, _L, _L, _L, _L, _L, _P, _P, _I, _P, _I),
    "attention": (*_HEADS, _P, _P, _P, _I),
    "attention_backward": (*_HEADS, _P, _P, _P, _P, _P, _P, _L, _P, _I),
    "slot_attention": (_P, _P, _P, _I, _L, _L, _L, _L, _P, _P, _L, _P, _L, _L, _F, _F, _P, _I),
    "add_scaled": (_P, _P, _I, _L, _F, _P, _I),
    "adamw8bit": (_P, _P, _P, _P, _P, _P, _L, _P, _P, ctypes.POINTER(_F), _I),
}


class _Table(ctypes.Structure):
    _fields_ = [
        ("instruction_set", ctypes.c_char_p),
        *((name, ctypes.CFUNCTYPE(None, *arguments)) for name, arguments in _SIGNATURES.items()),
    ]


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native kernels run here, with which instruction set, and why (not)."""

    available: bool
    instruction_set: str | None
    reason: str
    path: str | None


@functools.cache
def _load() -> tuple[_Table | None, NativeStatus, Any]:
    elsewhere = os.environ.get("FITUNE_KERNELS_LIBRARY")  # as `make sanitise` builds one
    path = Path(__file__).with_name("libfitune_kernels.so") if elsewhere is None else Path(elsewhere)
    if not path.is_file():
        reason = "not built: no C++ compiler was found when fitune was installed"
        if elsewhere is not None:
            reason = f"FITUNE_KERNELS_LIBRARY={elsewhere} is not a file"
        return None, NativeStatus(False, None, reason, None), None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, NativeStatus(False, None, f"cannot be loaded: {error}", str(path)), None
    library.fitune_abi.restype = ctypes.c_int
    if library.fitune_abi() != ABI:
        reason = f"built for interface {library.fitune_abi()}, this package needs {ABI}: install fitune again"
        return None, NativeStatus(False, None, reason, str(path)), None
    library.fitune_attention_floats.restype = ctypes.c_int64
    library.fitune_attention_floats.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    library.fitune_available.restype = ctypes.c_char_p
    library.fitune_kernels.restype = ctypes.POINTER(_Table)
    library.fitune_kernels.argtypes = [ctypes.c_char_p]
    available = library.fitune_available().decode().split()
    wanted = os.environ.get("FITUNE_INSTRUCTION_SET")
    if wanted is not None and wanted not in available:
        reason = f"FITUNE_INSTRUCTION_SET={wanted} cannot run here (this machine can run {', '.join(available)})"
        return None, NativeStatus(False, None, reason, str(path)), None
    name = wanted or available[0]
    why = "chosen by FITUNE_INSTRUCTION_SET" if wanted else f"best of {', '.join(available)}"
    if elsewhere is not None:
        why += ", from the library that FITUNE_KERNELS_LIBRARY names"
    return library.fitune_kernels(name.encode()).contents, NativeStatus(True, name, why, str(path)), library


def status() -> NativeStatus:
    """Whether the native kernels run here, and why (not)."""
    return _load()[1]


def _table() -> _Table:
    table, state, _ = _load()
    if table is None:
        raise RuntimeError(f"native kernels: {state.reason}")
    return table


def _pointer(tensor: Tensor, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> int:
    """The address of a contiguous CPU tensor; native code trusts what it is told, so dtype and shape are checked."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"a native kernel got a {'strided' if tensor.device.type == 'cpu' else 'foreign'} tensor")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"a native kernel got a tensor of {tensor.dtype} where it reads {dtype}")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"a native kernel got a tensor {tuple(tensor.shape)} where it reads {tuple(shape)}")
    return tensor.data_ptr()


def nf4_quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous()
    n = weight.numel()
    codes = torch.empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty((n + 63) // 64, dtype=torch.float32)
    _table().nf4_quantise(
        _pointer(weight), KINDS[weight.dtype], n, _pointer(codes), _pointer(absmax), torch.get_num_threads()
    )
    return codes, absmax


def nf4_dequantise(
    codes: Tensor, absmax_codes: Tensor, nested_absmax: Tensor, table: Tensor, offset: float,
    shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = empty(shape, dtype)
    n = out.numel()
    blocks = -(-n // 64)
    if codes.numel() != (n + 1) // 2:
        raise ValueError(f"{codes.numel()} bytes of codes for {n} weights")
    _table().nf4_dequantise(
        _pointer(codes, torch.uint8), _pointer(absmax_codes, torch.uint8, (blocks,)),
        _pointer(nested_absmax, torch.float32, (-(-blocks // 256),)), _pointer(table, torch.float32, (256,)), offset,
        n, _pointer(out), KINDS[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    out = empty(x.shape, x.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    _table().rms_norm(
        _pointer(x), _pointer(weight, shape=(width,)), KINDS[x.dtype], rows, width, eps, shift, _pointer(out),
        _pointer(rstd),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, rstd


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None, shift: float
) -> Tensor:
    grad_out, x, weight = grad_out.contiguous(), x.contiguous(), weight.to(x.dtype).contiguous()
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    residual = None if residual is None else residual.contiguous()
    grad_x = empty(x.shape, x.dtype)
    _table().rms_norm_backward(
        _pointer(grad_out, x.dtype, x.shape), _pointer(x), _pointer(weight, shape=(width,)),
        _pointer(rstd, torch.float32, x.shape[:-1]),
        None if residual is None else _pointer(residual, x.dtype, x.shape), KINDS[x.dtype], rows, width, shift,
        _pointer(grad_x), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = empty(gate.shape, gate.dtype)
    _table().gated_activation(
        _pointer(gate), _pointer(up, gate.dtype, gate.shape), KINDS[gate.dtype], ACTIVATIONS[activation],
        gate.numel(), _pointer(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_activation_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, gate, up = grad_out.contiguous(), gate.contiguous(), up.contiguous()
    out, grad_gate, grad_up = (empty(gate.shape, gate.dtype) for _ in range(3))
    _table().gated_activation_backward(
        _pointer(grad_out, gate.dtype, gate.shape), _pointer(gate), _pointer(up, gate.dtype, gate.shape),
        KINDS[gate.dtype], ACTIVATIONS[activation], gate.numel(), _pointer(grad_gate), _pointer(grad_up),
        _pointer(out), torch.get_num_threads(),
    )  # fmt: skip
    return grad_gate, grad_up, out


def token_logprob_(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    rows, width = logits.shape
    if rows and (int(targets.min()) < 0 or int(targets.max()) >= width):
        raise IndexError(f"a target lies outside the vocabulary of {width} tokens")
    targets = targets.contiguous()
    logprob = torch.empty(rows, dtype=torch.float32)
    _table().token_logprob(
        _pointer(logits), KINDS[logits.dtype], _pointer(targets, torch.int64, (rows,)), rows, width,
        int(with_gradient), _pointer(logprob), torch.get_num_threads(),
    )  # fmt: skip
    return logprob


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    if x.stride(2) != 1:
        x = x.contiguous()
    out = empty(x.shape, x.dtype)
    _rotate(x, cos, sin, inverse, out)
    return out


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    _rotate(x, cos, sin, inverse, x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    tokens, heads, width = x.shape
    half = cos.shape[-1]
    if 2 * half > width:
        raise ValueError(f"{2 * half} columns to rotate, and a head has {width}")
    _table().rotate(
        x.data_ptr(), KINDS[x.dtype], tokens, heads, width, half, x.stride(0), x.stride(1),
        _pointer(cos, torch.float32, (tokens, half)), _pointer(sin, torch.float32, (tokens, half)), int(inverse),
        _pointer(out), torch.get_num_threads(),
    )  # fmt: skip


def _heads(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: float, cap: float
) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The arguments that both passes share, and the tensors that must stay alive while they are used."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    rows, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    if k.shape != (rows, tokens, kv_heads, width) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"attention of queries {tuple(q.shape)} to keys {tuple(k.shape)}, values {tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention of {q.dtype} queries to {k.dtype} keys and {v.dtype} values")
    _check_documents(documents, rows, tokens)
    arguments: list[Any] = []
    for x in (q, k, v):
        arguments += [x.data_ptr(), _Strides(x.stride(0), x.stride(1), x.stride(2))]
    arguments += [
        KINDS[q.dtype], rows, tokens, heads, kv_heads, width, _pointer(documents), documents.shape[0], window, scale,
        cap,
    ]  # fmt: skip
    return arguments, (q, k, v)


class _Checked(threading.local):
    """What a thread found good last: every layer of a pass asks about the same documents."""

    def __init__(self) -> None:
        self.documents: weakref.ref[Tensor] | None = None
        self.facts: tuple[int, int, int] | None = None


_checked = _Checked()


def _check_documents(documents: Tensor, rows: int, tokens: int) -> None:
    """Documents lie inside the rows, their prefixes before them, and together they hold every token."""
    facts = (documents._version, rows, tokens)
    if _checked.documents is not None and _checked.documents() is documents and _checked.facts == facts:
        return
    _pointer(documents, torch.int32, (documents.shape[0], 5))
    row, start, stop, prefix_start, prefix_stop = documents.long().unbind(1)
    inside = (row >= 0) & (row < rows) & (start >= 0) & (start < stop) & (stop <= tokens)
    before = (prefix_start >= 0) & (prefix_start <= prefix_stop) & (prefix_stop <= start)
    before |= (prefix_start == 0) & (prefix_stop == 0)
    if not bool((inside & before).all()):
        raise ValueError(f"documents that do not lie in {rows} rows of {tokens} tokens")
    if int((stop - start).sum()) != rows * tokens:
        raise ValueError(f"documents of {int((stop - start).sum())} tokens in {rows} rows of {tokens}")
    _checked.documents, _checked.facts = weakref.ref(documents), facts


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: float, cap: float = 0.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, tokens, heads, width = q.shape
    arguments, _alive = _heads(q, k, v, documents, window, scale, cap)
    threads = torch.get_num_threads()
    out = empty((rows, tokens, heads, width), q.dtype)
    lse = torch.empty(rows, heads, tokens, dtype=torch.float32)
    workspace = empty((attention_floats(q.shape),), torch.float32)
    _table().attention(*arguments, _pointer(out), _pointer(lse), _pointer(workspace), threads)
    return out, lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Tensor, window: int,
    scale: float, cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    arguments, _alive = _heads(q, k, v, documents, window, scale, cap)
    grad_out = grad_out.contiguous()
    threads = torch.get_num_threads()
    split = _split_heads(q.shape, kv_heads, q.dtype)
    grad_q = empty((rows, tokens, heads, width), q.dtype)
    grad_k, grad_v = (empty((rows, tokens, kv_heads, width), q.dtype) for _ in range(2))
    workspace = empty((attention_backward_floats(q.shape, kv_heads, q.dtype),), torch.float32)
    _table().attention_backward(
        *arguments, _pointer(out, q.dtype, q.shape), _pointer(grad_out, q.dtype, q.shape),
        _pointer(lse, torch.float32, (rows, heads, tokens)), _pointer(grad_q), _pointer(grad_k), _pointer(grad_v),
        split, _pointer(workspace), threads,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def attention_floats(queries: torch.Size) -> int:
    """The forward pass's workspace; `queries` [rows, tokens, heads, width]."""
    _, tokens, _, width = queries
    return torch.get_num_threads() * int(_load()[2].fitune_attention_floats(tokens, width, 0))


def attention_backward_floats(queries: torch.Size, kv_heads: int, dtype: torch.dtype) -> int:
    """The backward pass's workspace: a thread's own, and the gradients of keys and values in float32."""
    rows, tokens, _, width = queries
    own = torch.get_num_threads() * int(_load()[2].fitune_attention_floats(tokens, width, 1))
    return own + 2 * rows * kv_heads * _split_heads(queries, kv_heads, dtype) * tokens * (-(-width // 32) * 32)


def _split_heads(queries: torch.Size, kv_heads: int, dtype: torch.dtype) -> int:
    """Key heads are the natural tasks; where they do not keep the threads evenly busy, query heads are.

    Kernels with dot products of bfloat16 divide the work themselves.
    """
    rows, _, heads, _ = queries
    threads = torch.get_num_threads()
    even = rows * kv_heads % threads == 0 or rows * kv_heads >= 4 * threads
    divides = dtype == torch.bfloat16 and status().instruction_set in ("amx", "avx512_bf16")
    return 1 if even or divides else heads // kv_heads


def slot_attention_(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, columns: Tensor, shared: int, window: int,
    scale: float, cap: float,
) -> Tensor:  # fmt: skip
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    rows, heads, width = q.shape
    slots, kv_heads, capacity, _ = keys.shape
    if k.shape != (rows, kv_heads, width) or v.shape != k.shape or heads % kv_heads or rows > slots:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}: {slots} slots")
    if rows and (int(columns.min()) < shared or int(columns.max()) >= capacity or shared < 0):
        raise IndexError(f"columns {columns.tolist()} in slots of {capacity}, the first {shared} of them shared")
    out = torch.empty_like(q)
    slot_shape = (slots, kv_heads, capacity, width)
    _table().slot_attention(
        _pointer(q), _pointer(k, q.dtype), _pointer(v, q.dtype), KINDS[q.dtype], rows, heads, kv_heads, width,
        _pointer(keys, q.dtype, slot_shape), _pointer(values, q.dtype, slot_shape), capacity,
        _pointer(columns, torch.int64, (rows,)), shared, window, scale, cap, _pointer(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    out = empty(x.shape, x.dtype)
    _table().add_scaled(
        _pointer(x), _pointer(y, x.dtype, x.shape), KINDS[x.dtype], x.numel(), scale, _pointer(out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def adamw8bit_(
    parameter: Tensor, grad: Tensor, codes1: Tensor, codes2: Tensor, absmax1: Tensor, absmax2: Tensor, map1: Tensor,
    map2: Tensor, settings: list[float],
) -> None:  # fmt: skip
    n = parameter.numel()
    blocks = (-(-n // 256),)
    if len(settings) != ADAMW_SETTINGS:
        raise ValueError(f"{len(settings)} settings of AdamW where {ADAMW_SETTINGS} are read")
    _table().adamw8bit(
        _pointer(parameter, torch.float32), _pointer(grad, torch.float32, tuple(parameter.shape)),
        _pointer(codes1, torch.uint8, (n,)), _pointer(codes2, torch.uint8, (n,)),
        _pointer(absmax1, torch.float32, blocks), _pointer(absmax2, torch.float32, blocks), n,
        _pointer(map1, torch.float32, (MOMENT_MAP_WORDS,)), _pointer(map2, torch.float32, (MOMENT_MAP_WORDS,)),
        (_F * ADAMW_SETTINGS)(*settings), torch.get_num_threads(),
    )  # fmt: skip
