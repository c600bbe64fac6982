"""A micro-batch as the model sees it: tokens, positions, documents, and a weight for every target."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents. Legend: B rows, T tokens in a row, n documents (padding included).

    Attributes:
        tokens: [B, T] int64.
        positions: [B, T] int64, from 0 at the beginning of every document's prefix, or its own.
        weights: [B, T] float32: what the log-probability of *this* token, given those before it in its
            document, counts in the loss. 0 for prompts, padding and the first token after every document's beginning.
        documents: [n, 5] int32, one line each: row, start, stop (tokens of that row), and prefix_start,
            prefix_stop: the tokens of the same row that the document continues and attends to (equal: none).
            Every token belongs to one document; padding at a row's end is one of weight 0.
        pairs: [p, 2] int64: of every preference pair the documents of its better and its worse answer.
        labels: [n] int8: of every document that is an answer judged by itself 1 (good) or -1 (bad); 0: it is none.
    """

    tokens: Tensor
    positions: Tensor
    weights: Tensor
    documents: Tensor
    pairs: Tensor = field(default_factory=lambda: torch.empty((0, 2), dtype=torch.int64))
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int8))

    @property
    def trained_tokens(self) -> int:
        """How many tokens have a non-zero weight."""
        return int(torch.count_nonzero(self.weights))

    def document_of(self, places: Tensor) -> Tensor:
        """The document that each of some places of the flattened rows belongs to; [n] int64."""
        starts = self.documents[:, 0].long() * self.tokens.shape[1] + self.documents[:, 1]
        return torch.searchsorted(starts, places, right=True) - 1

    @property
    def bounds(self) -> Tensor:
        """[n + 1] int32: where documents begin in the flattened rows, and the end.

        Raises ValueError where documents share prefixes: they do not lie in one piece then.
        """
        if bool((self.documents[:, 3] != self.documents[:, 4]).any()):
            raise ValueError("documents that share a prefix have no bounds")
        width = self.tokens.shape[1]
        starts = self.documents[:, 0] * width + self.documents[:, 1]
        return torch.cat([starts, torch.tensor([self.tokens.numel()], dtype=torch.int32)])
