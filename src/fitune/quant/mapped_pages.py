"""Weights that lie in mapped files: brought by having their pages read and mapped ahead, let go by unmapping them.

Nothing is copied: a tensor's address stays what it is. Pages that are let go remain in the system's file cache for as
long as there is room for them, and come back from there or from the disk.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fitune.errors import FituneError
from fitune.quant.parameter import QuantisedParameter, StoredTensors

PAGE_BYTES = mmap.PAGESIZE
# Linux's advice, from <linux/mman.h>; populating came with Linux 5.14.
_WILL_NEED, _DO_NOT_NEED, _POPULATE_READ = 3, 4, 22

Span = tuple[int, int]  # addresses of whole pages: first, and one past the last


class MappedPages:
    """The carrier of tensors that are views of mapped files.

    Args:
        groups: the parameters of each group.

    Raises FituneError for tensors that do not lie in mapped files: unmapping would destroy them.
    """

    device = torch.device("cpu")

    def __init__(self, groups: Sequence[Sequence[QuantisedParameter]]) -> None:
        self._spans = [spans_of(tensor for p in group for tensor in p.own_tensors()) for group in groups]
        check_mapped(span for spans in self._spans for span in spans)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fitune-stream")
        self._coming: dict[int, Future[None]] = {}

    def fetch(self, group: int) -> None:
        if group not in self._coming:
            self._coming[group] = self._worker.submit(_bring, self._spans[group])

    def wait(self, group: int) -> None:
        self.fetch(group)
        self._coming[group].result()

    def drop(self, group: int) -> None:
        coming = self._coming.pop(group, None)
        if coming is not None and not coming.cancel():
            coming.result()
        give_back(self._spans[group])

    def release(self) -> None:
        pass

    def tensors(self, parameter: QuantisedParameter) -> StoredTensors:
        return parameter.own_tensors()


def spans_of(tensors: Iterable[Tensor]) -> list[Span]:
    """The pages that tensors lie on, in order; neighbours are joined."""
    found = sorted(
        (tensor.data_ptr() // PAGE_BYTES * PAGE_BYTES, -(-_end(tensor) // PAGE_BYTES) * PAGE_BYTES)
        for tensor in tensors
        if tensor.numel()
    )
    joined: list[Span] = []
    for start, end in found:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _end(tensor: Tensor) -> int:
    return tensor.data_ptr() + tensor.numel() * tensor.element_size()


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in mapped files as a whole."""
    return tensor.is_cpu and not _outside(spans_of([tensor]))


def check_mapped(spans: Iterable[Span]) -> None:
    """Raises FituneError where a span does not lie in mapped files: its pages could not be read again."""
    outside = _outside(list(spans))
    if outside:
        raise FituneError(
            f"{len(outside)} stretches of frozen weights do not lie in mapped files, so that they cannot be let go "
            "and read again; train.resident_layers needs weights in a store (method qlora) on Linux"
        )


def _outside(spans: Sequence[Span]) -> list[Span]:
    """Those that do not lie in mapped files as a whole."""
    files = _joined(file_mappings())
    return [span for span in spans if not any(start <= span[0] and span[1] <= end for start, end in files)]


@dataclass(frozen=True)
class FileMapping:
    """Addresses where this process has a part of a file mapped.

    Attributes:
        offset: in the file, of what lies at `start`.
    """

    start: int
    end: int
    offset: int
    path: str


def file_mappings() -> list[FileMapping]:
    """All of this process, in order of their addresses. Empty where Linux does not say."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and not (path and path[0].startswith("/dev/")):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(FileMapping(start, end, int(offset, 16), path[0] if path else ""))
    return found


def _joined(mappings: Iterable[FileMapping]) -> list[Span]:
    """Adjacent ones are one span."""
    joined: list[Span] = []
    for mapping in mappings:
        if joined and mapping.start == joined[-1][1]:
            joined[-1] = (joined[-1][0], mapping.end)
        else:
            joined.append((mapping.start, mapping.end))
    return joined


def give_back(spans: Iterable[Span]) -> None:
    """Unmaps the pages of spans that lie in mapped files; they are read again when they are touched."""
    for start, end in spans:
        _advise(start, end, _DO_NOT_NEED)


def _bring(spans: Sequence[Span]) -> None:
    for start, end in spans:
        _advise(start, end, _WILL_NEED)  # the whole is asked of the disk at once
    for start, end in spans:
        _advise(start, end, _POPULATE_READ)  # waits, and maps; older systems map at the first touch


def _advise(start: int, end: int, advice: int) -> bool:
    """madvise, without holding Python's lock; whether the system took it."""
    done: int = _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return done == 0


_LIBC = ctypes.CDLL(None)
