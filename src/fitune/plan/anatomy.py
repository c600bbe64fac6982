"""What a model consists of, read from its whole graph without weights: bytes to the byte, and kinds of layers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fitune.adapters.targets import target_ranks
from fitune.adapters.whole_modules import whole_names, without_whole
from fitune.config.schema import RunConfig
from fitune.fuse.int8_calibration import OUTLIERS
from fitune.kernels.reference import BLOCK, NESTED_BLOCK
from fitune.models.graph import build_graph, expert_counts, head_name, parameter_dtype, quantised_names
from fitune.quant.stream import layer_number, resident_groups

# Attributes by which a layer knows its place; what it costs does not depend on them.
_PLACES = ("idx", "index", "layer_id", "layer_num")


@dataclass(frozen=True)
class Layers:
    """The stack of decoder layers.

    Attributes:
        path: name of their list in the graph; None where there is no single list that can be cut.
        twins: for every layer, the layer among the first `kept` that costs the same. The first layer stands for
            itself only: what comes before it needs no gradient.
        kept: so many layers, from the first on, show every kind there is.
    """

    path: str | None
    twins: tuple[int, ...]
    kept: int

    def with_at_least(self, count: int) -> Layers:
        """The same with at least `count` layers kept, each standing for itself."""
        kept = min(max(self.kept, count), len(self.twins))
        return Layers(self.path, self.twins, kept)


WHOLE = Layers(None, (), 0)


@dataclass(frozen=True)
class Anatomy:
    """Of a run's model.

    Attributes:
        frozen_bytes: weights that do not learn, and buffers.
        layer_bytes: what of them each decoder layer has in 4 bits.
        end_bytes: what of them is the table of embeddings alone, of which a step reads some rows.
        head_bytes: what of them is the output head, tied or not.
        int8_bytes: what is kept beside them for products in int8.
        trained: shape -> how many trained tensors have it; all are float32.
        expert_counts: how many experts its mixtures have.
        layers: its decoder layers.
        elements: how many numbers the model has, without adapters.
    """

    frozen_bytes: int
    layer_bytes: tuple[int, ...]
    end_bytes: int
    head_bytes: int
    int8_bytes: int
    trained: Counter[tuple[int, ...]]
    expert_counts: frozenset[int]
    layers: Layers
    elements: int

    def resident_bytes(self, resident_layers: int | None) -> int:
        """Of the frozen weights, where so many layers stay in memory (None: all), with one more coming and one going.

        The table of embeddings and the head are let go after each use then: `visiting_bytes`.
        """
        moving = self._moving(resident_layers)
        absent = sum(moving) - sum(moving[-2:])
        return self.frozen_bytes - absent - (self.end_bytes + self.head_bytes if moving else 0)

    def visiting_bytes(self, resident_layers: int | None) -> int:
        """What more there is while logits are made: the head, for which the two layers go."""
        moving = self._moving(resident_layers)
        return self.head_bytes - sum(moving[-2:]) if moving else 0

    def _moving(self, resident_layers: int | None) -> list[int]:
        """Bytes of the layers that do not stay, the largest last."""
        if resident_layers is None:
            return []
        staying = resident_groups(len(self.layer_bytes), resident_layers)
        return sorted(size for number, size in enumerate(self.layer_bytes) if number not in staying)

    @property
    def trained_bytes(self) -> int:
        """Of the weights that learn; PEFT keeps adapters in float32 too."""
        return 4 * self.trained_elements

    @property
    def trained_elements(self) -> int:
        """How many numbers learn."""
        return sum(prod(shape) * count for shape, count in self.trained.items())


def read_anatomy(run: RunConfig, config: PretrainedConfig, dtype: torch.dtype) -> Anatomy:
    """Builds the run's whole model on the meta device and counts.

    Raises InputError for a configuration without a model and for targets that match nothing.
    """
    full = run.method == "full"
    dtype = torch.float32 if full else dtype
    graph = build_graph(config, dtype)
    quantised = frozenset(quantised_names(graph) if run.method == "qlora" else ())
    whole = [] if full else whole_names(graph, run.lora.modules_to_save, quantised)
    adapted = {} if full else target_ranks(graph, head_name(graph), run.lora)
    adapted = without_whole(adapted, whole, run.lora.targets)
    frozen = _buffer_bytes(graph, dtype)
    trained: Counter[tuple[int, ...]] = Counter()
    in_layers: Counter[int] = Counter()
    for name, parameter in graph.named_parameters():
        if name in quantised:
            size = _nf4_bytes(parameter.numel())
            frozen += size
            number = layer_number(name)
            if number is not None:
                in_layers[number] += size
        elif not parameter.is_floating_point():
            frozen += parameter.numel() * parameter.element_size()
        elif full:
            trained[tuple(parameter.shape)] += 1
        else:
            frozen += parameter.numel() * parameter_dtype(graph, name, dtype).itemsize
    for name, rank in adapted.items():
        rows, columns = _features(graph.get_submodule(name))
        trained[rank, columns] += 1
        trained[rows, rank] += 1
        if run.lora.dora:
            trained[rows,] += 1  # its magnitudes
            frozen += 4 * rows  # and the squares of the weight's rows
    for copied in {id(p): p for name in whole for p in graph.get_submodule(name).parameters()}.values():
        trained[tuple(copied.shape)] += copied.is_floating_point()
    frozen += sum(one.numel() * one.element_size() for name in whole for one in graph.get_submodule(name).buffers())
    int8 = _int8_bytes(graph) if run.train.compute == "int8" else 0
    layer_bytes = tuple(in_layers[number] for number in sorted(in_layers))
    is_mapped = run.method == "qlora" and dtype != torch.float32  # wider ones are copies, and stay
    ends, head = (_embedding_bytes(graph, dtype), _head_bytes(graph, dtype)) if is_mapped else (0, 0)
    table = graph.get_input_embeddings()
    ends = 0 if any(graph.get_submodule(name) is table for name in whole) else ends
    head = 0 if head_name(graph) in whole else head  # the copy, which is never let go, is what is used
    return Anatomy(
        frozen,
        layer_bytes,
        ends,
        head,
        int8,
        trained,
        expert_counts(config),
        _layers(graph, None if full else adapted | dict.fromkeys(whole, 0)),
        sum(parameter.numel() for parameter in graph.parameters()),
    )


def _buffer_bytes(graph: PreTrainedModel, dtype: torch.dtype) -> int:
    """Of buffers: what a checkpoint carries is held like a parameter, the rest as it was computed."""
    carried = graph.state_dict().keys()
    return sum(
        buffer.numel() * (
            parameter_dtype(graph, name, dtype) if name in carried and buffer.is_floating_point() else buffer.dtype
        ).itemsize
        for name, buffer in graph.named_buffers()
    )  # fmt: skip


def _embedding_bytes(graph: PreTrainedModel, dtype: torch.dtype) -> int:
    """Of the table of embeddings; 0 where it is the head too."""
    table, head = graph.get_input_embeddings(), graph.get_output_embeddings()
    weight = getattr(table, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight is getattr(head, "weight", None):
        return 0
    return weight.numel() * dtype.itemsize


def _head_bytes(graph: PreTrainedModel, dtype: torch.dtype) -> int:
    weight = getattr(graph.get_output_embeddings(), "weight", None)
    return weight.numel() * dtype.itemsize if isinstance(weight, torch.Tensor) else 0


def _nf4_bytes(elements: int) -> int:
    blocks = -(-elements // BLOCK)
    return (elements + 1) // 2 + blocks + 4 * -(-blocks // NESTED_BLOCK)


def _int8_bytes(graph: PreTrainedModel) -> int:
    """Of the scales of the rows and the outliers' columns of all linear layers but the head."""
    head = head_name(graph)
    sizes = [_features(m) for name, m in graph.named_modules() if isinstance(m, nn.Linear) and name != head]
    return sum(rows * (4 + 2 * min(OUTLIERS, columns)) for rows, columns in sizes)


def _features(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    if isinstance(module, Conv1D):
        columns, rows = module.weight.shape
        return rows, columns
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def _layers(graph: PreTrainedModel, adapted: Mapping[str, int] | None) -> Layers:
    """`adapted`: names of the layers with an adapter, and its rank (0: trained whole); None where all learn."""
    path, modules = _largest_list(graph)
    if path is None or _share_parameters(modules):
        return WHOLE
    per_layer = _per_layer_settings(graph.config.get_text_config(), len(modules))
    kinds: list[Hashable] = []
    # Whether a gradient must flow into the layer.
    flows = adapted is None or any(graph.get_submodule(name) is graph.get_input_embeddings() for name in adapted)
    for number, module in enumerate(modules):
        inside = _adapted_inside(f"{path}.{number}.", adapted)
        kinds.append((number == 0, flows, inside, tuple(values[number] for values in per_layer), _kind(module)))
        flows = flows or bool(inside)
    first: dict[Hashable, int] = {}
    for number, kind in enumerate(kinds):
        first.setdefault(kind, number)
    return Layers(path, tuple(first[kind] for kind in kinds), max(first.values()) + 1)


def _largest_list(graph: PreTrainedModel) -> tuple[str | None, list[nn.Module]]:
    """The list of modules with the most parameters that lies in no other list."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in graph.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    if not lists:
        return None, []
    path = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    parent = path.rpartition(".")[0]
    beside = [name for name in lists if name != path and name.rpartition(".")[0] == parent]
    # A forward that walks through several lists in step cannot do with one of them shortened.
    if any(len(lists[name]) == len(lists[path]) for name in beside):
        return None, []
    return path, list(lists[path])


def _share_parameters(modules: Sequence[nn.Module]) -> bool:
    owners = Counter(itertools.chain.from_iterable({id(p) for p in module.parameters()} for module in modules))
    return any(count > 1 for count in owners.values())


def _per_layer_settings(config: PretrainedConfig, layers: int) -> list[Sequence[Hashable]]:
    """Lists of the configuration with one entry a layer, such as `layer_types`."""
    return [
        value for name, value in sorted(vars(config).items())
        if isinstance(value, (list, tuple)) and len(value) == layers
        and all(isinstance(entry, (str, int)) for entry in value) and value != list(range(layers))
    ]  # fmt: skip


def _adapted_inside(prefix: str, adapted: Mapping[str, int] | None) -> tuple[tuple[str, int], ...]:
    found = (adapted or {}).items()
    return tuple(sorted((name.removeprefix(prefix), rank) for name, rank in found if name.startswith(prefix)))


def _kind(layer: nn.Module) -> Hashable:
    """What two layers must share to cost the same: modules, shapes, and every setting but their places."""
    modules = tuple(
        (name, type(module).__qualname__, _settings(module)) for name, module in layer.named_modules()
    )  # fmt: skip
    return modules, tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())


def _settings(module: nn.Module) -> tuple[tuple[str, Hashable], ...]:
    return tuple(
        (name, value) for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, str, type(None))) and not any(word in name for word in _PLACES)
    )  # fmt: skip
