"""Memory for what the native kernels make in a forward and a backward pass, used again by the next.

A general heap keeps what is saved for the backward pass between what lives for one product, and is left with
holes: its resident size was a tenth to a third above what was alive (docs/log.md, "rooms"). Here every result of some
size has a mapping of its own, which the next result of about that size takes over when nobody holds the first any
more: no holes, no pages to fault in anew, and a resident size that is what a pass needs.
"""

from __future__ import annotations

import bisect
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

# Below this the heap is as good: small results leave small holes.
SMALLEST_BYTES = 1 << 18
# A room may be so much larger than what it is taken for; most rows differ by less.
SLACK = 1.125
GRAIN_BYTES = 1 << 16
HUGE_BYTES = 1 << 21
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


@dataclass(slots=True)
class _Room:
    """A mapping, and the pass it was last taken in."""

    memory: Any
    pass_number: int

    @property
    def is_free(self) -> bool:
        """Whether no tensor lies in it: each holds a reference to the mapping."""
        return self.holders() == _UNUSED

    def holders(self) -> int:
        """References to the mapping, this room's own and the counting's included."""
        return sys.getrefcount(self.memory)


class Rooms(threading.local):
    """A thread's rooms, in the order of their sizes.

    Args:
        make: gives the memory of a new room, of so many bytes; a plan's rooms have none.

    Attributes:
        is_open: whether results are put into rooms now.
    """

    def __init__(self, make: Callable[[int], Any] | None = None) -> None:
        self.is_open = False
        self._make = make or private_memory
        self._sizes: list[int] = []
        self._rooms: list[_Room] = []
        self._pass = 0

    @property
    def held_bytes(self) -> int:
        """Of all rooms, taken or not."""
        return sum(self._sizes)

    def take(self, size_bytes: int) -> Any:
        """A mapping of at least so many bytes that nobody uses; it is used for as long as somebody refers to it."""
        size = -(-size_bytes // GRAIN_BYTES) * GRAIN_BYTES
        place = bisect.bisect_left(self._sizes, size)
        while place < len(self._sizes) and self._sizes[place] <= SLACK * size:
            room = self._rooms[place]
            if room.is_free:
                room.pass_number = self._pass
                return room.memory
            place += 1
        self._make_way(size)
        memory = self._make(size)
        place = bisect.bisect_left(self._sizes, size)
        self._sizes.insert(place, size)
        self._rooms.insert(place, _Room(memory, self._pass))
        return memory

    def _make_way(self, size: int) -> None:
        """Lets go of free rooms that this pass has not used yet, as many as the new one takes."""
        for place in reversed(range(len(self._rooms))):
            if size <= 0:
                return
            room = self._rooms[place]
            if room.pass_number != self._pass and room.is_free:
                size -= self._sizes[place]
                del self._rooms[place], self._sizes[place]

    def end_pass(self) -> None:
        """Lets go of the rooms that this pass did not use."""
        kept = [n for n, room in enumerate(self._rooms) if room.pass_number == self._pass or not room.is_free]
        self._rooms, self._sizes = [self._rooms[n] for n in kept], [self._sizes[n] for n in kept]
        self._pass += 1

    def clear(self) -> None:
        """Lets go of all rooms; those that tensors lie in end with them."""
        self._rooms, self._sizes = [], []


def private_memory(size: int) -> mmap.mmap:
    """Memory of this process alone, in large pages where the system has them for those who ask.

    Python's own default is memory that is shared with child processes, which Linux gives in small pages.
    """
    memory = mmap.mmap(-1, size, **_PRIVATE)
    if size >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


rooms = Rooms()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty` on the CPU; in a room where rooms are open and it is large enough for one."""
    count = prod(shape)
    size = count * dtype.itemsize
    if not rooms.is_open or size < SMALLEST_BYTES:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(rooms.take(size), dtype=dtype, count=count)
    # Not a view of `flat`: autograd has rules for those.
    made: Tensor = torch.empty(0, dtype=dtype).set_(flat.untyped_storage(), 0, tuple(shape))
    return made


@contextmanager
def a_pass() -> Iterator[None]:
    """Inside, results of native kernels lie in rooms, which stay for the next pass where this one used them.

    A pass is a micro-batch's: the next one of the same step may have rows of another length, and its rooms must not
    come on top.
    """
    was_open, rooms.is_open = rooms.is_open, True
    try:
        yield
    finally:
        rooms.is_open = was_open
        rooms.end_pass()


_UNUSED = _Room(mmap.mmap(-1, GRAIN_BYTES), 0).holders()
