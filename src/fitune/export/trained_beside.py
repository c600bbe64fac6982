"""The weights that an adapter was trained beside: the base's own, or what they are in 4 bits.

Most adapters are merged into the base's own 16-bit weights, whatever they were trained in. One that makes up for the
4 bits (`lora.initial: loftq`) has what was lost to them in itself: with the base's own it would be added twice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fitune.adapters.lora import belongs_to_four_bits
from fitune.kernels import native
from fitune.models.conversion import GraphTensors
from fitune.models.graph import quantised_names
from fitune.quant.nf4 import quantise


class TrainedBase:
    """Of the adapter in a folder, on the model `graph` whose tensors are `tensors`."""

    def __init__(self, adapter: Path, graph: PreTrainedModel, tensors: GraphTensors) -> None:
        self._tensors = tensors
        self._in_four_bits = frozenset(quantised_names(graph) if belongs_to_four_bits(adapter) else ())
        self._backend = "native" if native.status().available else "reference"

    @property
    def is_own(self) -> bool:
        """Whether it is the base's own weights."""
        return not self._in_four_bits

    def weight(self, name: str, own: Tensor) -> Tensor:
        """An adapted weight as it was trained beside; `own` is the base's."""
        if name not in self._in_four_bits:
            return own
        # As the store does: what is wider than its checkpoint or than 16 bits is rounded before.
        dtype = self._tensors.by_name[name].targets[name][1]
        if dtype == torch.float32 and not self._tensors.stays_wide(name):
            dtype = torch.bfloat16
        return quantise(own.to(dtype), self._backend).dense(torch.float32, self._backend)
