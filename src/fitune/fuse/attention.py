"""Causal attention that knows document bounds, as a transformers attention function.

Packed rows carry `document_bounds` as a keyword argument down to the attention; each document is attended to by
itself, so that no mask is ever built and no work is spent on pairs in different documents. A keyword that would
change the result and is not known here is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fitune.errors import FituneError

NAME = "fitune_documents"
# Keywords that attention functions are given and that do not change what is computed here.
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "num_items_in_batch", "is_causal", "dropout", "position_embeddings", "output_router_logits",
    "past_key_values", "labels",
}  # fmt: skip


def document_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    document_bounds: Sequence[int] | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, H, T, D], key and value [B, K, S, D] -> [B, T, H, D].

    Raises FituneError for a keyword argument that may change the result and is not covered.
    """
    unknown = [name for name, value_ in kwargs.items() if value_ is not None and name not in _HARMLESS]
    if unknown:
        raise FituneError(f"attention does not cover {', '.join(unknown)} ({type(module).__name__})")
    if dropout and not module.training:
        dropout = 0.0
    if attention_mask is not None or document_bounds is None:
        causal = attention_mask is None and query.shape[2] > 1
        if attention_mask is None and sliding_window is not None and key.shape[2] > sliding_window:
            raise FituneError("a sliding window needs a mask or document bounds")
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    rows, heads, tokens, width = query.shape
    pieces = []
    for start, stop in pairwise(document_bounds):
        row, first, last = start // tokens, start % tokens, (stop - 1) % tokens + 1
        q, k, v = (tensor[row : row + 1, :, first:last] for tensor in (query, key, value))
        length = last - first
        mask = None
        if sliding_window is not None and length > sliding_window:
            index = torch.arange(length, device=query.device)
            distance = index.unsqueeze(1) - index
            mask = (distance >= 0) & (distance < sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
            enable_gqa=heads != key.shape[1],
        )  # fmt: skip
        pieces.append(out.transpose(1, 2).reshape(length, heads, width))
    return torch.cat(pieces).view(rows, tokens, heads, width), None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for whole causal sequences (the attention function sees to them); transformers' own otherwise."""
    if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Makes the attention known to transformers as `NAME`, with its mask function."""
    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, _mask)
