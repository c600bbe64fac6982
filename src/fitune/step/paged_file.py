"""Tensors that lie in a file on disk, mapped into memory, and pages of them that are given back.

The map is shared: what is written into it is the file's, so pages that are given back are only unmapped, and come
back from the page cache or the disk when they are touched again (madvise(2), MADV_DONTNEED). With a private or
anonymous map the same call would throw away what was written; `PagedFile` makes its own map and no other.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fitune.errors import DiskFullError
from fitune.hardware import disk_free_bytes

# Tensors begin at multiples of this, as those of torch's own allocator do.
ALIGNMENT_BYTES = 64
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def place_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What a tensor takes in a `PagedFile`."""
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class PagedFile:
    """A file in `folder` that has no name: the system removes it when the process ends, however it ends.

    Its room on disk is taken at once: a map into a file that cannot grow ends the process (SIGBUS).

    Raises DiskFullError where `folder` has no `size_bytes` left.
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        free = disk_free_bytes(folder)
        if free < size_bytes:
            raise _too_small(folder, size_bytes, free)
        self._size = max(size_bytes, mmap.PAGESIZE)
        self._used = 0
        with tempfile.TemporaryFile(dir=folder, prefix=".paged-") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self._size)
                else:  # macOS: the check above has to do
                    os.truncate(file.fileno(), self._size)
            except OSError as error:
                if error.errno in _FULL:
                    raise _too_small(folder, size_bytes, free) from error
                raise
            self._map = mmap.mmap(file.fileno(), self._size, flags=mmap.MAP_SHARED)
        self._start = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()

    def zeros(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """A tensor in the next free place of the file, zero as all of a new file is."""
        place, self._used = self._used, self._used + place_bytes(shape, dtype)
        if self._used > self._size:
            raise ValueError(f"a file of {self._size} bytes cannot hold {self._used}")
        return torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=place).view(shape)

    def give_back(self, tensor: Tensor) -> None:
        """Unmaps the pages of a tensor of this file; its values stay, in the page cache or on disk.

        `tensor` may be any part of one that lies in one piece. Raises ValueError for one that is not of this file.
        """
        start, end = self._range(tensor)
        if hasattr(mmap, "MADV_DONTNEED") and end > start:
            # Whole pages, its neighbours' ends too: they come back as they were.
            start -= start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this file."""
        return 0 <= tensor.data_ptr() - self._start < self._size

    def _range(self, tensor: Tensor) -> tuple[int, int]:
        if tensor.numel() == 0:
            return 0, 0
        start = tensor.data_ptr() - self._start
        end = start + tensor.numel() * tensor.element_size()
        if not (self.holds(tensor) and end <= self._size):
            raise ValueError("a tensor that does not lie in this file")
        return start, end


def _too_small(folder: Path, size_bytes: int, free: int) -> DiskFullError:
    return DiskFullError(
        f"{folder}: gradients and optimizer states on disk (train.optimizer_states) need {size_bytes / 1e9:.2f} GB, "
        f"{free / 1e9:.2f} GB are free"
    )


def in_memory_order(tensor: Tensor) -> Tensor:
    """All elements of a tensor that has no gaps, [n], in the order in which they lie in memory; a view.

    Raises ValueError for a tensor with gaps, or whose elements share places.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if last + 1 != tensor.numel():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps")
    return cast(Tensor, tensor.as_strided((tensor.numel(),), (1,)))
