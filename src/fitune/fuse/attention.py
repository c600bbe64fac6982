"""Causal attention within documents, as a transformers attention function.

Packed rows carry `documents` as a keyword argument down to the attention; each document is attended to by itself
(and its prefix), so that no mask is ever built and no work is spent on pairs in different documents. A keyword
that would change the result and is not known here is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fitune.errors import FituneError
from fitune.kernels import contract
from fitune.models.dropout import attention_dropout_of

# One name for each backend: a transformers attention function is chosen by name, and is told no more.
NAMES = {"native": "fitune_documents_native", "reference": "fitune_documents_reference"}
# Keywords that attention functions are given and that do not change what is computed here.
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "num_items_in_batch", "position_embeddings", "output_router_logits",
    "past_key_values", "labels",
}  # fmt: skip
_KINDS = {"full_attention", "sliding_attention"}


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a model's attention cannot be done by documents; None if it can, by its structure."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not getattr(model, "_supports_attention_backend", False):
        return "the model takes no other attention function"
    if not kinds <= _KINDS:
        return f"there are layers of kinds {', '.join(sorted(kinds - _KINDS))}"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "there are layers with convolutions along the sequence"
    if attention_dropout_of(config):
        return "attention has dropout (train.model_dropout: 0 turns it off)"
    return None


def register() -> None:
    """Makes the attention known to transformers under `NAMES`, with its mask function."""
    for backend, name in NAMES.items():
        AttentionInterface.register(name, _attention_of(backend))
        AttentionMaskInterface.register(name, _mask)


def _attention_of(backend: str) -> Any:
    def document_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
        documents: Tensor | None = None, is_causal: bool | None = None, softcap: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """query [B, H, T, D], key and value [B, K, S, D] -> [B, T, H, D].

        Raises FituneError for a keyword argument that may change the result and is not covered.
        """
        unknown = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
        if unknown or dropout:
            raise FituneError(f"attention does not cover {unknown or 'dropout'} ({type(module).__name__})")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise FituneError(f"attention that is not causal is not covered ({type(module).__name__})")
        # A rotary embedding computed in float32 leaves queries and keys wider than the values.
        query, key = query.to(value.dtype), key.to(value.dtype)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        seen = _SEEN.get()
        if seen is not None:
            seen[id(module)] = (scale, sliding_window or 0, softcap or 0.0)
        if documents is not None:
            narrow = value.shape[-1]
            if narrow < query.shape[-1]:  # latent attention: values narrower than keys
                value = F.pad(value, (0, query.shape[-1] - narrow))
            if not query.shape[-1] == key.shape[-1] == value.shape[-1] or query.shape[2] != key.shape[2]:
                raise FituneError(
                    f"attention does not cover queries {tuple(query.shape)}, keys {tuple(key.shape)}, "
                    f"values {tuple(value.shape)} ({type(module).__name__})"
                )
            out = _DocumentAttention.apply(
                *(x.transpose(1, 2) for x in (query, key, value)),
                documents,
                sliding_window or 0,
                scale,
                softcap or 0.0,
                backend,
            )
            return out[..., :narrow], None
        return masked_attention(query, key, value, attention_mask, scale, sliding_window or 0, softcap or 0.0), None

    return document_attention


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, window: int, cap: float
) -> Tensor:  # fmt: skip
    """Attention as transformers itself asks for it, query [B, H, T, D], key and value [B, K, S, D] -> [B, T, H, D].

    mask [B, 1, T, S] (None: causal, which for one query is everything); window and cap 0: none.
    """
    if mask is None and window and key.shape[2] > window:
        raise FituneError("a sliding window needs a mask or documents")
    if cap:
        return _capped(query, key, value, mask, scale, cap)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and query.shape[2] > 1, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float
) -> Tensor:  # fmt: skip
    """Attention with bent scores, which torch's own cannot: for few queries at a time."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3)
    scores = cap * torch.tanh(scores.float() * (scale / cap))
    if mask is None:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(value.dtype) @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous()


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Tensor,
        window: int,
        scale: float,
        cap: float,
        backend: str,
    ) -> Tensor:
        out, lse = contract.attention(q, k, v, documents, window, scale, cap, backend)
        ctx.save_for_backward(q, k, v, out, lse, documents)
        ctx.settings = window, scale, cap, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, documents = ctx.saved_tensors
        grads = contract.attention_backward(grad_out, q, k, v, out, lse, documents, *ctx.settings)
        return *grads, None, None, None, None, None


_SEEN: ContextVar[dict[int, tuple[float, int, float]] | None] = ContextVar("seen", default=None)


@contextmanager
def seen_calls() -> Iterator[dict[int, tuple[float, int, float]]]:
    """Inside, id(attention module) -> the scale, window (0: none) and cap (0: none) that it asked for."""
    seen: dict[int, tuple[float, int, float]] = {}
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


_DOCUMENTS_GIVEN: ContextVar[bool] = ContextVar("documents_given", default=False)


@contextmanager
def documents_given() -> Iterator[None]:
    """Inside, every forward pass is given `documents`, and no mask is built: they say it all."""
    token = _DOCUMENTS_GIVEN.set(True)
    try:
        yield
    finally:
        _DOCUMENTS_GIVEN.reset(token)


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask where documents are given; transformers' own otherwise (None for whole causal sequences)."""
    if _DOCUMENTS_GIVEN.get() and attention_mask is None:
        return None
    mask: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return mask
