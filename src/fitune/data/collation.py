"""Rows of encoded samples in, one micro-batch of tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fitune.data.batch import Batch
from fitune.data.encoding import EncodedSample


def collate(rows: Sequence[Sequence[EncodedSample]], row_tokens: int, pad_id: int) -> Batch:
    """B rows of samples -> a Batch [B, T], T being the longest row's tokens (at most `row_tokens`).

    T is not rounded up: what a kernel needs in alignment it pads itself, where it costs no attention.

    Raises:
        ValueError: there are no rows, a row or sample is empty, or a row is longer than `row_tokens`.
    """
    if not rows or not all(row and all(len(sample) for sample in row) for row in rows):
        raise ValueError("a batch needs at least one row, and a row at least one sample that is not empty")
    used = [sum(len(sample) for sample in row) for row in rows]
    longest = max(used)
    if longest > row_tokens:
        raise ValueError(f"a row of {longest} tokens, but rows hold {row_tokens}")
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    positions = torch.zeros((len(rows), longest), dtype=torch.int64)
    weights = torch.zeros((len(rows), longest), dtype=torch.float32)
    bounds = [0]
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample)
            tokens[number, start:end] = torch.tensor(sample.tokens)
            positions[number, start:end] = torch.arange(end - start)
            weights[number, start:end] = torch.tensor(sample.trained, dtype=torch.float32)
            weights[number, start] = 0.0  # nothing in its document precedes the first token
            bounds.append(number * longest + end)
            start = end
        if start < longest:
            positions[number, start:] = torch.arange(longest - start)
            bounds.append((number + 1) * longest)
    return Batch(tokens, positions, weights, torch.tensor(bounds, dtype=torch.int32))
