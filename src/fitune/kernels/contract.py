"""The operators: schema, fake, and the choice of an implementation by an explicit `backend` argument.

Each is a `torch.library` operator `fitune::NAME`. Under fake tensors only the fake runs, whatever the backend.
`backend` is "native" (csrc, CPU) or "reference" (plain torch, any device); it is handed down from the plan and
never read off a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fitune.kernels import native, reference
from fitune.kernels.registration import operator

BACKENDS = ("native", "reference")
_MODULES = {"native": native, "reference": reference}


def _operator(schema: str) -> Any:
    """Defines `fitune::NAME` of this schema; the decorated function is its fake."""
    name = schema.split("(")[0]
    implementations = {backend: getattr(module, name) for backend, module in _MODULES.items()}

    def run(*arguments: Any) -> Any:
        *values, backend = arguments
        return implementations[backend](*values)

    return operator(schema, run)


@_operator("nf4_quantise(Tensor weight, str backend) -> (Tensor, Tensor)")
def nf4_quantise(weight: Tensor) -> Any:
    n = weight.numel()
    codes = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return codes, weight.new_empty((n + 63) // 64, dtype=torch.float32)


@_operator(
    "nf4_dequantise(Tensor codes, Tensor absmax_codes, Tensor nested_absmax, Tensor table, float offset, "
    "int[] shape, ScalarType dtype, str backend) -> Tensor"
)
def nf4_dequantise(
    codes: Tensor, absmax_codes: Tensor, nested_absmax: Tensor, table: Tensor, offset: float,
    shape: list[int], dtype: torch.dtype,
) -> Any:  # fmt: skip
    return codes.new_empty(shape, dtype=dtype)


@_operator("rms_norm(Tensor x, Tensor weight, float eps, float shift, str backend) -> (Tensor, Tensor)")
def rms_norm(x: Tensor, weight: Tensor, eps: float, shift: float) -> Any:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_operator(
    "rms_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor rstd, Tensor? residual, float shift, "
    "str backend) -> Tensor"
)
def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None, shift: float
) -> Any:
    """The gradient of x, plus `residual` (of its shape)."""
    return x.new_empty(x.shape)


@_operator("gated_activation(Tensor gate, Tensor up, str activation, str backend) -> Tensor")
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Any:
    return gate.new_empty(gate.shape)


@_operator(
    "gated_activation_backward(Tensor grad_out, Tensor gate, Tensor up, str activation, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
def gated_activation_backward(grad_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> Any:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@_operator("token_logprob_(Tensor(a!) logits, Tensor targets, bool with_gradient, str backend) -> Tensor")
def token_logprob_(logits: Tensor, targets: Tensor, with_gradient: bool) -> Any:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@_operator("rotate_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse, str backend) -> ()")
def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Turns x [tokens, heads, D], without gaps, in place by cos, sin [tokens, half]; `inverse`: back."""


@_operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor documents, int window, float scale, float cap, "
    "str backend) -> (Tensor, Tensor)"
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: float, cap: float
) -> Any:  # fmt: skip
    rows, tokens, heads, width = q.shape
    return q.new_empty(rows, tokens, heads, width), q.new_empty(rows, heads, tokens, dtype=torch.float32)


@_operator(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor documents, "
    "int window, float scale, float cap, str backend) -> (Tensor, Tensor, Tensor)"
)
def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Tensor, window: int,
    scale: float, cap: float,
) -> Any:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@_operator(
    "slot_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor columns, int shared, "
    "int window, float scale, float cap, str backend) -> Tensor"
)
def slot_attention_(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, columns: Tensor, shared: int, window: int,
    scale: float, cap: float,
) -> Tensor:  # fmt: skip
    """One new token a row, q [n, H, D], k and v [n, K, D], over the slots `keys`, `values` [slots, K, capacity, D].

    k and v of row i are written to column columns[i] (int64) of slot i; it attends to the columns up to there.
    The first `shared` columns hold the same in every slot.
    """
    return q.new_empty(q.shape)


@_operator("add_scaled(Tensor x, Tensor y, float scale, str backend) -> Tensor")
def add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape)


@_operator(
    "adamw8bit_(Tensor(a!) parameter, Tensor grad, Tensor(b!) codes1, Tensor(c!) codes2, Tensor(d!) absmax1, "
    "Tensor(e!) absmax2, Tensor map1, Tensor map2, float[] settings, str backend) -> ()"
)
def adamw8bit_(
    parameter: Tensor, grad: Tensor, codes1: Tensor, codes2: Tensor, absmax1: Tensor, absmax2: Tensor, map1: Tensor,
    map2: Tensor, settings: list[float],
) -> None:  # fmt: skip
    """One step of AdamW with moments in 8 bits; maps of `quant.moments`, settings as csrc/fitune_kernels.h says."""
