"""A key-value cache with a slot for every row of the batch, allocated once.

transformers' own cache grows by concatenation, which copies all of it for every token (half of the decoding
time of a small model at batch 32), and its rows all have the same length. Here row i occupies the columns
0 .. length_i of its slot, whatever the others do, so a column is a position, rows need no left padding, a row
can leave and another take its slot at any time, and a prefix that all prompts share is written once a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from fitune.errors import FituneError


class SlotLayer(DynamicLayer):
    """The slots of one decoder layer: keys and values [B, K, capacity, D]."""

    def __init__(self, cache: SlotCache, like_keys: Tensor, like_values: Tensor) -> None:
        super().__init__()
        self._cache = cache
        rows, capacity = cache.rows, cache.capacity
        # Zeros, because masked columns still enter products with weight 0 and so must be finite.
        self.keys = like_keys.new_zeros(rows, like_keys.shape[1], capacity, like_keys.shape[3])
        self.values = like_values.new_zeros(rows, like_values.shape[1], capacity, like_values.shape[3])
        self.dtype, self.device = like_keys.dtype, like_keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """One new column a row, [n, K, 1, D] each -> all columns so far, [n, K, T, D] views."""
        active, length = self._cache.active, self._cache.length
        lines = self._cache.lines(key_states.shape[1])
        self.keys.view(-1, self.keys.shape[3]).index_copy_(0, lines, key_states.reshape(-1, self.keys.shape[3]))
        self.values.view(-1, self.values.shape[3]).index_copy_(
            0, lines, value_states.reshape(-1, self.values.shape[3])
        )
        return self.keys[:active, :, :length], self.values[:active, :, :length]

    def get_seq_length(self) -> int:
        """The columns before the new one, in the longest row: what masks are sized by."""
        return self._cache.length - 1


class SlotCache(Cache):
    """Slots for `rows` sequences of at most `capacity` tokens, shaped like the layers of a filled cache.

    Attributes:
        active: how many slots are in use; they are the first ones, always without gaps.
        length: the columns of the longest active row, the new token's included.
        columns: where each active row's new token goes [active].
        shared: how many first columns are the same in all slots.
        kept: what the model's parts keep for as long as the cache lives.
    """

    def __init__(self, like: Cache, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self.active = 0
        self.length = 1
        self.columns = torch.zeros(0, dtype=torch.long)
        self.shared = 0
        self.kept: dict[Any, Any] = {}
        self._lines: dict[int, Tensor] = {}
        super().__init__(layers=[SlotLayer(self, layer.keys, layer.values) for layer in like.layers])

    def fill_prefix(self, prefix: Cache, tokens: int) -> None:
        """Writes the shared prefix's keys and values [1, K, tokens, D] into every slot."""
        for mine, theirs in zip(self.layers, prefix.layers, strict=True):
            mine.keys[:, :, :tokens] = theirs.keys[:, :, :tokens]
            mine.values[:, :, :tokens] = theirs.values[:, :, :tokens]
        self.shared = tokens

    def admit(self, filled: Cache, first_slot: int, start: int) -> None:
        """Copies the columns from `start` on of all rows of `filled` into the slots from `first_slot` on."""
        for mine, theirs in zip(self.layers, filled.layers, strict=True):
            rows, _, end, _ = theirs.keys.shape
            slots = slice(first_slot, first_slot + rows)
            mine.keys[slots, :, start:end] = theirs.keys[:, :, start:]
            mine.values[slots, :, start:end] = theirs.values[:, :, start:]

    def move(self, source: int, target: int, start: int, end: int) -> None:
        """Copies columns start .. end of slot `source` to slot `target` (the prefix is there already)."""
        for layer in self.layers:
            layer.keys[target, :, start:end] = layer.keys[source, :, start:end]
            layer.values[target, :, start:end] = layer.values[source, :, start:end]

    def begin_step(self, columns: Sequence[int]) -> None:
        """Says at which column each active row writes its new token; call before every forward."""
        self.active = len(columns)
        self.length = max(columns) + 1
        if self.active > self.rows or self.length > self.capacity:
            raise FituneError(f"{self.active} rows of up to {self.length} tokens in {self.rows} of {self.capacity}")
        self.columns = torch.tensor(columns, dtype=torch.long)
        self._lines.clear()

    def lines(self, heads: int) -> Tensor:
        """Where the new columns lie in the slots flattened to [B * K * capacity, D]: [n * K] int64."""
        if heads not in self._lines:
            slot_heads = torch.arange(self.active * heads).view(self.active, heads)
            lines = slot_heads * self.capacity + self.columns.unsqueeze(1)
            self._lines[heads] = lines.flatten().to(self.layers[0].device)
        return self._lines[heads]
