"""Saving all weights of a fully fine-tuned model as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from fitune.atomic import new_folder
from fitune.fuse.model import FusedModel
from fitune.models.conversion import GraphTensors, Group
from fitune.models.graph import build_graph
from fitune.models.shards import TensorPlan, plan_shards, write_shards
from fitune.models.source import ModelSource
from fitune.models.written_form import written_form

STORED = torch.bfloat16
SHARD_BYTES = 5_000_000_000


def save_weights(model: FusedModel, source: ModelSource, folder: Path) -> str:
    """Writes weights (bfloat16), configuration and tokenizer into `folder`, whole or not at all.

    Of a multimodal model the whole is written: the trained text decoder, and its other weights as they were.
    Returns a hash over the exact float32 bits that were trained.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.graph.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    with new_folder(folder) as beside:
        tensors = _TrainedTensors(model, source)
        write_shards(beside, plan_shards(tensors.plans, SHARD_BYTES), tensors.read)
        source.write_companions(beside)
        path = beside / "config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        field = "torch_dtype" if "torch_dtype" in settings else "dtype"
        path.write_text(json.dumps(settings | {field: str(STORED).removeprefix("torch.")}, indent=2) + "\n")
    return digest.hexdigest()


class _TrainedTensors:
    """The model's tensors in the checkpoint's own form, and all that is no part of the graph as it is.

    Attributes:
        plans: every tensor to be written, in an order in which no group has to be made twice.
    """

    def __init__(self, model: FusedModel, source: ModelSource) -> None:
        self._source = source
        self._graph = build_graph(source.config, STORED)
        self._state = model.graph.state_dict()
        self._tied = self._graph.all_tied_weights_keys
        self._made: dict[str, Group] = {}
        self._last: tuple[Group, dict[str, Tensor]] | None = None
        tensors = GraphTensors(source, self._graph)
        self.plans: list[TensorPlan] = []
        for group in tensors.groups:
            shapes = {name: _stored(torch.empty_like(self._value(name), device="meta")) for name in group.targets}
            for written, value in written_form(source, self._graph, group, shapes).items():
                self._made[written] = group
                self.plans.append(TensorPlan(written, tuple(value.shape), value.dtype))
        self._others = {source.written_name(name): name for name in [*tensors.unused, *source.carried_names()]}
        self.plans += [
            TensorPlan(written, source.shape(name), source.dtype(name)) for written, name in self._others.items()
        ]

    def read(self, name: str) -> Tensor:
        """One tensor by its written name. Keeps the group that it came from, and no other."""
        if name in self._others:
            return self._source.read(self._others[name])
        group = self._made[name]
        if self._last is None or self._last[0] is not group:
            self._last = None  # before the next one is made, so that there are never two
            mine = {target: _stored(self._value(target)) for target in group.targets}
            self._last = (group, written_form(self._source, self._graph, group, mine))
        return self._last[1][name]

    def _value(self, name: str) -> Tensor:
        """A checkpoint may hold either of two tied tensors, or both."""
        return self._state[name if name in self._state else self._tied[name]]


def _stored(value: Tensor) -> Tensor:
    return value.to(STORED) if value.is_floating_point() else value
