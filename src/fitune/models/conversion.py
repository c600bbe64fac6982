"""From a checkpoint's tensors to a graph's: renamed, split, stacked as transformers does when it loads.

A checkpoint's names are not always those of transformers' graph: prefixes differ, experts lie one by one and are
stacked into three-dimensional parameters, fused projections are split. transformers keeps the rules as a mapping;
this room applies them one group of tensors at a time, so that nothing but one group is ever in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from fitune.errors import InputError
from fitune.models.graph import parameter_dtype
from fitune.models.source import ModelSource


@dataclass(frozen=True)
class Group:
    """Checkpoint tensors that become graph tensors together.

    Attributes:
        sources: checkpoint names, in the order in which the rule takes them.
        targets: graph names, with shape and dtype as `read` gives them.
    """

    sources: tuple[str, ...]
    targets: dict[str, tuple[tuple[int, ...], torch.dtype]]
    _first: str
    _patterns: tuple[str, ...]
    _rule: Any

    @property
    def is_renamed_only(self) -> bool:
        """One tensor under another name, its values untouched."""
        return self._rule is None


class GraphTensors:
    """The tensors of `graph`, read from `source` through transformers' own conversion rules."""

    def __init__(self, source: ModelSource, graph: PreTrainedModel) -> None:
        self._source = source
        self._graph = graph
        # Checkpoint tensors that no parameter of the graph is made of; those that transformers knows it has no use
        # for (copies of buffers, parts for other tasks), and the others.
        self.unused: list[str] = []
        self.unknown: list[str] = []
        self.groups = self._find_groups()
        self.by_name = {name: group for group in self.groups for name in group.targets}
        useless = [re.compile(pattern) for pattern in graph._keys_to_ignore_on_load_unexpected or ()]
        useless.append(re.compile(r"rotary_emb\.inv_freq$"))
        for name in self.unknown[:]:
            if any(pattern.search(name) for pattern in useless):
                self.unknown.remove(name)
                self.unused.append(name)

    def check(self) -> None:
        """Raises one InputError for all tensors that are missing, unknown or of the wrong shape."""
        wanted = self._graph.state_dict(keep_vars=True)
        tied = self._graph.all_tied_weights_keys
        optional = [re.compile(pattern) for pattern in self._graph._keys_to_ignore_on_load_missing or ()]
        present = {*self.names, *(target for target, origin in tied.items() if origin in self)}
        present |= {origin for target, origin in tied.items() if target in self}
        problems = [
            f"tensor {name} is missing" for name in wanted
            if name not in present and not any(pattern.search(name) for pattern in optional)
        ]  # fmt: skip
        problems += [f"tensor {name} is not part of this architecture" for name in self.unknown]
        problems += [
            f"tensor {name} has shape {self.shape(name)}, the configuration wants {tuple(wanted[name].shape)}"
            for name in self.names if self.shape(name) != tuple(wanted[name].shape)
        ]  # fmt: skip
        if problems:
            raise InputError(first_problems(problems), where=self._source.reference)

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    @property
    def names(self) -> list[str]:
        """Graph names that the checkpoint has values for."""
        return list(self.by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.by_name[name].targets[name][0]

    def stays_wide(self, name: str) -> bool:
        """Whether transformers keeps a graph tensor in float32 whatever the rest is in."""
        return parameter_dtype(self._graph, name, torch.bfloat16) == torch.float32

    def sources(self, name: str) -> tuple[str, ...]:
        """The checkpoint tensors that a graph tensor is made of."""
        return self.by_name[name].sources

    def read(self, group: Group) -> dict[str, Tensor]:
        """The graph tensors of one group. A renamed tensor may be a read-only view of its file."""
        return self._convert(group._first, group._patterns, group.sources, group._rule, self._source.read)

    def _find_groups(self) -> list[Group]:
        rules = get_model_conversion_mapping(self._graph)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        wanted = self._graph.state_dict(keep_vars=True)
        prefix = self._graph.base_model_prefix
        collected: dict[str, tuple[Any, list[str], list[str]]] = {}
        for name in sorted(self._source.tensor_names(), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
            if target not in wanted and name in wanted:
                target, pattern = name, None
            if target not in wanted and pattern is None:
                self.unknown.append(name)
                continue
            rule = by_pattern[pattern] if pattern is not None else None
            _, names, patterns = collected.setdefault(target, (rule, [], []))
            names.append(name)
            patterns.append(pattern if pattern is not None else name)
        groups = []
        for first, (rule, names, patterns) in collected.items():
            made = self._convert(first, tuple(patterns), tuple(names), rule, self._meta)
            targets = {name: (tuple(value.shape), value.dtype) for name, value in made.items()}
            odd = [name for name in targets if name not in wanted]
            if odd:
                self.unknown.extend(names)
                continue
            groups.append(Group(tuple(names), targets, first, tuple(patterns), rule))
        return groups

    def _meta(self, name: str) -> Tensor:
        return torch.empty(self._source.shape(name), dtype=self._source.dtype(name), device="meta")

    def _convert(
        self, first: str, patterns: tuple[str, ...], names: tuple[str, ...], rule: Any, read: Any
    ) -> dict[str, Tensor]:
        if rule is None:
            return {first: read(names[0])}
        working = deepcopy(rule)
        for name, pattern in zip(names, patterns, strict=True):
            working.add_tensor(first, name, pattern, lambda name=name: read(name))
        try:
            made = working.convert(first, model=self._graph, config=self._graph.config)
        except Exception as error:  # whatever a rule stumbles over, it stumbles over the checkpoint
            raise InputError(
                f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} cannot be turned into {first}: {error}",
                where=self._source.reference,
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def first_problems(problems: list[str]) -> list[str]:
    """At most twenty, and how many more there are."""
    return problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])


def checkpoint_tensors(graph: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Graph tensors -> the tensors of a checkpoint, under its names: the way back."""
    result: dict[str, Tensor] = revert_weight_conversion(graph, dict(tensors))
    return result
