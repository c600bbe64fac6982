"""Counts the bytes of live tensor storage while operators run, on real or fake tensors."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fitune.kernels.native import attention_backward_floats, attention_floats
from fitune.kernels.registration import NAMESPACE
from fitune.kernels.rooms import SMALLEST_BYTES, Rooms

# What they make outlives the pass, and is not put into rooms.
_OUTSIDE = frozenset({"fitune::adapter_gradients"})


@dataclass(frozen=True)
class Stretch:
    """What happened to the live bytes between two marks.

    Attributes:
        change: bytes alive at the end, less those at the start.
        rise: the most alive at one time, less those at the start.
        operator: what ran at that time.
    """

    change: int
    rise: int
    operator: str


@dataclass(frozen=True)
class Stretches:
    """What happened between two marks: to all that is alive, to what of it lies in rooms, and to the rest."""

    all: Stretch
    in_rooms: Stretch
    outside: Stretch


class _Count:
    """Bytes alive, and the most there were since `reset`."""

    def __init__(self) -> None:
        self.current = self.peak = self._start = 0
        self.operator = ""

    def add(self, size: int, operator: str) -> None:
        self.current += size
        if self.current > self.peak:
            self.peak, self.operator = self.current, operator

    def reset(self) -> None:
        self.peak, self.operator = self.current, ""
        self._start = self.current

    def stretch(self) -> Stretch:
        found = Stretch(self.current - self._start, self.peak - self._start, self.operator)
        self.reset()
        return found


class LiveBytes(TorchDispatchMode):
    """Inside, every storage that an operator makes is counted until it is freed.

    Args:
        rooms: where the results of native kernels would lie; they are taken there as a step takes them. None: all of
            memory is alike.
    """

    def __init__(self, rooms: Rooms | None = None) -> None:
        super().__init__()
        self._rooms = rooms
        self._all, self._in_rooms, self._outside = _Count(), _Count(), _Count()
        self._known: dict[int, Any] = {}

    @property
    def current(self) -> int:
        """Bytes alive now, of storages made inside."""
        return self._all.current

    @property
    def peak(self) -> int:
        """The most there were at once since `reset_peak`."""
        return self._all.peak

    @property
    def peak_operator(self) -> str:
        """The operator that made the peak."""
        return self._all.operator

    def reset_peak(self) -> None:
        """Starts counting the peak, and a stretch, anew."""
        for count in (self._all, self._in_rooms, self._outside):
            count.reset()

    def stretches(self) -> Stretches:
        """What happened since the last `stretches` or `reset_peak`; the peaks are counted anew."""
        return Stretches(self._all.stretch(), self._in_rooms.stretch(), self._outside.stretch())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        if func.is_view:  # of a tensor that may just have become fake: nothing new in memory
            return out
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in inputs:
                self._count(leaf.untyped_storage(), func)
        if self._rooms is not None and (size := _workspace_bytes(func, args)) >= SMALLEST_BYTES:
            self._rooms.take(size)
        return out

    def _count(self, storage: torch.UntypedStorage, func: Any) -> None:
        key, size, operator = storage._cdata, storage.nbytes(), str(func)
        if key in self._known:
            return
        room = None
        if self._rooms is not None and size >= SMALLEST_BYTES and _is_native(func):
            room = self._rooms.take(size)
        self._known[key] = room
        part = self._outside if room is None else self._in_rooms
        for count in (self._all, part):
            count.add(size, operator)

        def freed() -> None:
            self._known.pop(key, None)
            for count in (self._all, part):
                count.current -= size

        weakref.finalize(storage, freed)


def _is_native(func: Any) -> bool:
    return func.namespace == NAMESPACE and func._schema.name not in _OUTSIDE


def _workspace_bytes(func: Any, args: Any) -> int:
    """Of what a native kernel works in, beside its results."""
    if func is torch.ops.fitune.attention.default:
        return 4 * attention_floats(args[0].shape)
    if func is torch.ops.fitune.attention_backward.default:
        return 4 * attention_backward_floats(args[1].shape, args[2].shape[2], args[1].dtype)
    return 0
