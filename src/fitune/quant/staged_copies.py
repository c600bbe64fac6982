"""Weights in host memory, copied to a device a layer ahead of their use, through buffers that are used again.

A worker gathers a group's tensors into a page-locked host buffer, and from there they go to one of the device's
buffers, on a stream of its own where the device has streams: the copy of the next group runs while this one computes.
Written for any torch device; it has been run with the CPU as the device, not on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fitune.quant.parameter import QuantisedParameter, StoredTensors
from fitune.quant.placed import Place

# CUDA allocates at this alignment, and vectorised loads ask for less.
ALIGNMENT_BYTES = 256


class StagedCopies:
    """The carrier to another device.

    Args:
        groups: the parameters of each group; their own tensors stay in host memory, mapped or not.
        device: where they are computed with.
    """

    def __init__(self, groups: Sequence[Sequence[QuantisedParameter]], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._groups = groups
        self._places: dict[int, tuple[int, list[Place]]] = {}
        self._sizes = [self._lay_out(number, group) for number, group in enumerate(groups)]
        largest = max(self._sizes, default=0)
        self._locked = torch.empty(largest, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self._free: list[_Buffer] = []
        self._held: dict[int, _Buffer] = {}
        self._copied: Any = None  # the event after which the host buffer may be written again
        self._lane = torch.Stream(self.device) if _has_streams(self.device) else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fitune-stream")
        self._coming: dict[int, Future[None]] = {}

    def _lay_out(self, number: int, group: Sequence[QuantisedParameter]) -> int:
        """Decides where the tensors of a group lie in its buffer; its size in bytes."""
        end = 0
        for parameter in group:
            places = []
            for tensor in parameter.own_tensors():
                places.append(Place(end, tuple(tensor.shape), tensor.dtype))
                end += -(-places[-1].size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            self._places[id(parameter)] = number, places
        return end

    def fetch(self, group: int) -> None:
        if group not in self._coming:
            self._coming[group] = self._worker.submit(self._copy, group)

    def wait(self, group: int) -> None:
        self.fetch(group)
        self._coming[group].result()
        buffer = self._held[group]
        if buffer.arrived is not None:
            torch.accelerator.current_stream(self.device).wait_event(buffer.arrived)

    def drop(self, group: int) -> None:
        coming = self._coming.pop(group, None)
        if coming is None or coming.cancel():
            return
        coming.result()
        buffer = self._held.pop(group)
        if self._lane is not None:  # what was computed with it may still be under way
            buffer.left = torch.accelerator.current_stream(self.device).record_event()
        self._free.append(buffer)

    def release(self) -> None:
        pass  # buffers stay: what was computed with them may still be under way

    def tensors(self, parameter: QuantisedParameter) -> StoredTensors:
        number, places = self._places[id(parameter)]
        codes, absmax, nested = (place.of(self._held[number].room) for place in places)
        return codes, absmax, nested

    def _copy(self, number: int) -> None:
        size = self._sizes[number]
        if self._copied is not None:
            self._copied.synchronize()
        for parameter in self._groups[number]:
            for place, tensor in zip(self._places[id(parameter)][1], parameter.own_tensors(), strict=True):
                place.of(self._locked).copy_(tensor)
        buffer = self._free_buffer(size)
        with self._lane or nullcontext():
            if self._lane is not None and buffer.left is not None:
                self._lane.wait_event(buffer.left)
            buffer.room[:size].copy_(self._locked[:size], non_blocking=True)
            if self._lane is not None:
                self._copied = buffer.arrived = self._lane.record_event()
        self._held[number] = buffer

    def _free_buffer(self, size: int) -> _Buffer:
        for place, buffer in enumerate(self._free):
            if buffer.room.numel() >= size:
                return self._free.pop(place)
        return _Buffer(torch.empty(size, dtype=torch.uint8, device=self.device))


@dataclass
class _Buffer:
    """On the device; `arrived` when its content is there, `left` when nobody reads the one before."""

    room: Tensor
    arrived: Any = None
    left: Any = None


def _has_streams(device: torch.device) -> bool:
    return device.type != "cpu"
