"""Counts the bytes of live tensor storage while operators run, on real or fake tensors."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class LiveBytes(TorchDispatchMode):
    """Inside, every storage that an operator makes is counted until it is freed.

    Attributes:
        current: bytes alive now, of storages made inside.
        peak: the most there were at once since `reset_peak`.
        peak_operator: the operator that made the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.peak_operator = ""
        self._known: set[int] = set()
        self._start = 0

    def reset_peak(self) -> None:
        """Starts counting the peak, and a stretch, anew."""
        self.peak, self.peak_operator = self.current, ""
        self._start = self.current

    def stretch(self) -> Stretch:
        """What happened since the last `stretch` or `reset_peak`; the peak is counted anew."""
        found = Stretch(self.current - self._start, self.peak - self._start, self.peak_operator)
        self.reset_peak()
        return found

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
        return out

    def _count(self, storage: torch.UntypedStorage, func: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.current += size
        if self.current > self.peak:
            self.peak, self.peak_operator = self.current, str(func)

        def freed() -> None:
            self._known.discard(key)
            self.current -= size

        weakref.finalize(storage, freed)
