"""torch's own attention kernel behind the signature of `fitune.kernels.contract`, for the ablation table.

What `scaled_dot_product_attention` calls on a CPU, forward and backward; as there, keys and values are repeated where
several heads share them. Documents that are whole rows go in one call, others one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: float, cap: float, backend: str
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D], log-sum-exp [B, H, T].

    Raises RuntimeError for windows, caps and shared beginnings, which the kernel does not know.
    """
    rows, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(rows, heads, tokens, dtype=torch.float32)
    for place, span in _spans(documents, q, window, cap):
        parts = _heads_first(q, k, v, place, span)
        found, sums = _forward(*parts, 0.0, True, scale=scale)
        out[place, span] = found.transpose(1, 2)
        lse[place, :, span] = sums
    return out, lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Tensor, window: int,
    scale: float, cap: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, in their shapes."""
    made = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for place, span in _spans(documents, q, window, cap):
        parts = _heads_first(q, k, v, place, span)
        grad, result = (x[place, span].transpose(1, 2) for x in (grad_out, out))
        found = _backward(grad, *parts, result, lse[place, :, span], 0.0, True, scale=scale)
        for into, one in zip(made, found, strict=True):
            kv_heads = into.shape[2]
            summed = one if one.shape[1] == kv_heads else one.unflatten(1, (kv_heads, -1)).sum(2)
            into[place, span] = summed.transpose(1, 2)
    return made


def _spans(documents: Tensor, q: Tensor, window: int, cap: float) -> Iterator[tuple[slice, slice]]:
    """Rows and their tokens that attend to each other."""
    if window or cap or bool((documents[:, 4] > documents[:, 3]).any()):
        raise RuntimeError("torch's kernel knows no windows, no caps and no shared beginnings")
    rows, tokens = q.shape[:2]
    if documents.shape[0] == rows and bool((documents[:, 2] - documents[:, 1] == tokens).all()):
        yield slice(None), slice(None)
        return
    for row, start, stop in documents[:, :3].tolist():
        yield slice(row, row + 1), slice(start, stop)


def _heads_first(q: Tensor, k: Tensor, v: Tensor, place: slice, span: slice) -> list[Tensor]:
    """[B, H, T, D] of each, keys and values repeated for every head."""
    group = q.shape[2] // k.shape[2]
    parts = [x[place, span].transpose(1, 2) for x in (q, k, v)]
    return parts if group == 1 else [parts[0], *(x.repeat_interleave(group, 1) for x in parts[1:])]
