"""A micro-batch as the model sees it: tokens, positions, document bounds, and a weight for every target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents. Legend: B rows, T tokens in a row, n documents (padding included).

    Attributes:
        tokens: [B, T] int64.
        positions: [B, T] int64, restarting at 0 with every document.
        weights: [B, T] float32: what the log-probability of *this* token, given those before it in its
            document, counts in the loss. 0 for prompts, padding and the first token of every document.
        bounds: [n + 1] int32: where documents begin in the flattened rows; bounds[0] = 0, bounds[-1] = B*T.
            Padding at a row's end is a document of its own with weight 0; no document crosses a row.
    """

    tokens: Tensor
    positions: Tensor
    weights: Tensor
    bounds: Tensor

    @property
    def trained_tokens(self) -> int:
        """How many tokens have a non-zero weight."""
        return int(torch.count_nonzero(self.weights))
