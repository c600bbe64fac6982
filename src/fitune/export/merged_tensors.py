"""A checkpoint's tensors with an adapter in them, under the checkpoint's own names, one group of tensors at a time.

An adapter speaks of the graph's modules; a checkpoint may hold the same weights under other names, several in one
or one in several. What the adapter does not touch is handed on as it lies in the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from fitune.export.adapter_delta import LoraPair
from fitune.export.trained_beside import TrainedBase
from fitune.export.whole_tensors import WholeTensor
from fitune.models.conversion import GraphTensors, Group
from fitune.models.shards import TensorPlan
from fitune.models.source import ModelSource
from fitune.models.written_form import written_form


class MergedTensors:
    """All tensors of the merged checkpoint of `source`, whose graph is `graph`, with `pairs` merged in.

    Args:
        tensors: the source's tensors as the graph has them.
        pairs: graph name of a weight -> what is merged into it.
        base: the weights that the adapter was trained beside.

    Attributes:
        plans: every tensor to be written, in an order in which no group has to be made twice.
        count: how many weights the adapter changes, tied ones as one.

    Raises:
        InputError: an adapted weight cannot be put back into the checkpoint's own form.
    """

    def __init__(
        self, source: ModelSource, graph: PreTrainedModel, tensors: GraphTensors,
        pairs: Mapping[str, LoraPair | WholeTensor], base: TrainedBase,
    ) -> None:  # fmt: skip
        self._source = source
        self._graph = graph
        self._tensors = tensors
        self._pairs = pairs
        self._base = base
        # A checkpoint may hold either of two tied tensors.
        tied = {name for pair in graph.all_tied_weights_keys.items() for name in pair}
        self._waiting = {name for name in pairs if name in tensors.by_name or name not in tied}
        self.count = len(self._waiting)
        # Written name -> the name in the source, or the group that it is made of.
        self._untouched: dict[str, str] = {}
        self._made: dict[str, Group] = {}
        self._last: tuple[Group, dict[str, torch.Tensor]] | None = None
        self.plans = self._find_plans()

    @property
    def unmerged(self) -> list[str]:
        """Adapted weights that no tensor read so far is made of."""
        return sorted(self._waiting)

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its written name. Keeps the group that it came from, and no other."""
        if name in self._untouched:
            return self._source.read(self._untouched[name])
        group = self._made[name]
        if self._last is None or self._last[0] is not group:
            self._last = None  # before the next one is made, so that there are never two
            self._last = (group, written_form(self._source, self._graph, group, self._merge(group)))
        return self._last[1][name]

    def _find_plans(self) -> list[TensorPlan]:
        group_of = {
            name: group for group in self._tensors.groups if not self._waiting.isdisjoint(group.targets)
            for name in group.sources
        }  # fmt: skip
        plans: list[TensorPlan] = []
        planned: set[int] = set()
        for name in [*self._source.tensor_names(), *self._source.carried_names()]:
            group = group_of.get(name)
            if group is None:
                written = self._source.written_name(name)
                self._untouched[written] = name
                plans.append(TensorPlan(written, self._source.shape(name), self._source.dtype(name)))
            elif id(group) not in planned:
                planned.add(id(group))
                for written, tensor in written_form(self._source, self._graph, group, _empty(group)).items():
                    self._made[written] = group
                    plans.append(TensorPlan(written, tuple(tensor.shape), tensor.dtype))
        return plans

    def _merge(self, group: Group) -> dict[str, torch.Tensor]:
        """The graph's tensors of one group, each in its own dtype, cast once after the sum in float32."""
        merged = self._tensors.read(group)
        for name in self._pairs.keys() & merged.keys():
            weight = merged[name]
            merged[name] = self._pairs[name].merged(self._base.weight(name, weight)).to(weight.dtype)
            self._waiting.discard(name)
        return merged


def _empty(group: Group) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in group.targets.items()}
