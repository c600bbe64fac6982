"""Weights in mapped files, read past the system's file cache into buffers that are used again.

For files that the cache has no room for: it would be filled, mapped and cleared behind for nothing (docs/log.md,
"past the file cache", also for what has not been measured). The mapping itself is not touched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fitune.errors import FituneError
from fitune.kernels.rooms import HUGE_BYTES, private_memory
from fitune.quant.mapped_pages import FileMapping, Span, check_mapped, file_mappings, give_back, spans_of
from fitune.quant.parameter import QuantisedParameter, StoredTensors
from fitune.quant.placed import Place


class NoDirectReadsError(FituneError):
    """The file system does not read past its cache."""


@dataclass(frozen=True)
class _Read:
    """Whole pages of an open file (the last one as far as the file goes), and where in the buffer they go.

    Attributes:
        address: where they are mapped.
    """

    file: int
    path: str
    offset: int
    size: int
    start: int
    address: int


class DirectReads:
    """The carrier of tensors that are views of mapped files, for files larger than the cache.

    Args:
        groups: the parameters of each group.

    Raises FituneError for tensors that do not lie in mapped files, NoDirectReadsError where the files cannot be read
    so.
    """

    device = torch.device("cpu")

    def __init__(self, groups: Sequence[Sequence[QuantisedParameter]]) -> None:
        self._spans = [spans_of(tensor for p in group for tensor in p.own_tensors()) for group in groups]
        check_mapped(span for spans in self._spans for span in spans)
        self._files = _DirectFiles()
        self._reads: list[list[_Read]] = []
        self._places: dict[int, tuple[int, list[Place]]] = {}
        for number, (group, spans) in enumerate(zip(groups, self._spans, strict=True)):
            self._reads.append(list(self._files.reads(spans)))
            for parameter in group:
                self._places[id(parameter)] = number, [_place(tensor, spans) for tensor in parameter.own_tensors()]
        for spans, reads in zip(self._spans, self._reads, strict=True):
            for read in reads:
                _check_same(read)
            give_back(spans)  # what was touched before is not needed beside the buffers
        self._largest = max((_size(spans) for spans in self._spans), default=0)
        self._free: list[Tensor] = []
        self._held: dict[int, Tensor] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fitune-stream")
        self._coming: dict[int, Future[None]] = {}

    def fetch(self, group: int) -> None:
        if group not in self._coming:
            self._held[group] = self._free.pop() if self._free else _buffer(self._largest)
            self._coming[group] = self._worker.submit(_fill, self._held[group], self._reads[group])

    def wait(self, group: int) -> None:
        self.fetch(group)
        self._coming[group].result()

    def drop(self, group: int) -> None:
        coming = self._coming.pop(group, None)
        if coming is None:
            return
        if not coming.cancel():
            coming.exception()  # waits; whoever waits for the group is told of a fault
        self._free.append(self._held.pop(group))

    def release(self) -> None:
        self._free.clear()

    def tensors(self, parameter: QuantisedParameter) -> StoredTensors:
        number, places = self._places[id(parameter)]
        codes, absmax, nested = (place.of(self._held[number]) for place in places)
        return codes, absmax, nested


class _DirectFiles:
    """The files that are mapped, opened for reading past the cache; closed when nobody has this any more."""

    def __init__(self) -> None:
        self._mappings = file_mappings()
        self._open: dict[str, int] = {}
        self._closing = ExitStack()

    def reads(self, spans: Iterable[Span]) -> Iterable[_Read]:
        """What brings `spans` into a buffer, one behind the other."""
        at = 0
        for start, end in spans:
            for mapping in self._mappings:
                first, last = max(start, mapping.start), min(end, mapping.end)
                if first < last:
                    file, offset = self._file(mapping), mapping.offset + first - mapping.start
                    size = min(last - first, os.fstat(file).st_size - offset)
                    yield _Read(file, mapping.path, offset, size, at + first - start, first)
            at += end - start

    def _file(self, mapping: FileMapping) -> int:
        if mapping.path not in self._open:
            try:
                file = os.open(mapping.path, os.O_RDONLY | os.O_DIRECT)
            except (OSError, AttributeError) as error:  # a file replaced since, a file system or a system without
                raise NoDirectReadsError(f"{mapping.path} cannot be read past the file cache: {error}") from error
            self._closing.callback(os.close, file)
            self._open[mapping.path] = file
        return self._open[mapping.path]

    def __del__(self) -> None:
        self._closing.close()


def _check_same(read: _Read) -> None:
    """A page as it is mapped, and as it is read now: a file may have been replaced since, by one of the same name."""
    page = _buffer(mmap.PAGESIZE)
    try:
        _fill(page, [replace(read, size=min(read.size, mmap.PAGESIZE), start=0)])
    except FituneError as error:  # opened, but not read so
        raise NoDirectReadsError(str(error)) from error
    size = min(read.size, mmap.PAGESIZE)
    if ctypes.string_at(read.address, size) != page[:size].numpy().tobytes():
        raise NoDirectReadsError(f"{read.path} is not the file any more that is mapped")


def _size(spans: Iterable[Span]) -> int:
    return sum(end - start for start, end in spans)


def _place(tensor: Tensor, spans: Iterable[Span]) -> Place:
    """Where a tensor of a group is in its buffer."""
    at = 0
    for start, end in spans:
        if start <= tensor.data_ptr() < end:
            at += tensor.data_ptr() - start
            break
        at += end - start
    return Place(at, tuple(tensor.shape), tensor.dtype)  # one without elements lies anywhere


def _buffer(size: int) -> Tensor:
    """Of whole large pages."""
    return torch.frombuffer(private_memory(-(-size // HUGE_BYTES) * HUGE_BYTES), dtype=torch.uint8)


def _fill(buffer: Tensor, reads: Sequence[_Read]) -> None:
    room = memoryview(buffer.numpy())
    for read in reads:
        done, whole_pages = 0, -(-read.size // mmap.PAGESIZE) * mmap.PAGESIZE
        while done < read.size:
            wanted = room[read.start + done : read.start + whole_pages]
            try:
                count = os.preadv(read.file, [wanted], read.offset + done)
            except OSError as error:
                raise FituneError(f"{read.path} cannot be read at byte {read.offset + done}: {error}") from error
            if not count:
                raise FituneError(f"{read.path} has become shorter: it ends at byte {read.offset + done}")
            done += count
