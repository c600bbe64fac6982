"""Where tensors lie in a buffer of bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Of one tensor: its first byte in the buffer, its shape and dtype."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor; a view of `buffer` [uint8]."""
        return buffer[self.start : self.start + self.size_bytes].view(self.dtype).view(self.shape)
