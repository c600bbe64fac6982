"""Frozen weights that do not all stay in memory: the next layer comes while this one computes, the last one goes.

Which layer is computing shows in which weight is reached: no module above knows of the stream, and whatever reaches
weights (a forward pass, a backward pass that computes layers again, generation) has them brought. What follows a
layer is what followed it the last time it was reached from the same side; before that its neighbour is expected.
How weights are brought and let go is a carrier's affair: mapped_pages.py, staged_copies.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from fitune.quant.parameter import QuantisedParameter, StoredTensors

_NONE = -1
_NUMBER = re.compile(r"\.(\d+)\.")


class Carrier(Protocol):
    """Brings the stored tensors of groups of parameters, and lets them go.

    Attributes:
        device: where they are when they are here.
    """

    device: torch.device

    def fetch(self, group: int) -> None:
        """Begins to bring a group; returns at once."""

    def wait(self, group: int) -> None:
        """Returns when the group is here, whether it was asked for before or not."""

    def drop(self, group: int) -> None:
        """Lets a group go; what uses it now may end."""

    def release(self) -> None:
        """Gives memory back that no group is in."""

    def tensors(self, parameter: QuantisedParameter) -> StoredTensors:
        """A parameter of a group that is here."""


class LayerStream:
    """The groups of a model that are here: those that stay, the one that computes, and the one after it.

    Args:
        groups: parameters that are used together, in the order of a forward pass.
        carrier: moves them.
        resident: how many groups stay, spread evenly, so that each gives those between time to come.

    Attributes:
        note: what there is to say of how they come; None: nothing.
        end_used: to be called when embeddings or head have been used past their modules; lets them go.
        moves: how often another group was reached; mistaken: how often it was not the one that was brought.
    """

    def __init__(self, groups: Sequence[Sequence[QuantisedParameter]], carrier: Carrier, resident: int = 0) -> None:
        self._carrier = carrier
        self._group = {id(parameter): number for number, group in enumerate(groups) for parameter in group}
        self._count = len(groups)
        self.staying = resident_groups(len(groups), resident)
        self._here: set[int] = set()
        self._current = self._before = _NONE
        self._made_room = False
        self._after: dict[tuple[int, int], int] = {}
        self.moves = self.mistaken = 0
        self.note: str | None = None
        self.end_used: Callable[[], None] = lambda: None
        for group in groups:
            for parameter in group:
                parameter.stream = self
        for number in range(self._count):
            if number not in self.staying:
                carrier.drop(number)

    @property
    def device(self) -> torch.device:
        """Where the tensors are that `reach` gives."""
        return self._carrier.device

    def reach(self, parameter: QuantisedParameter) -> StoredTensors:
        """The stored tensors, here until a parameter of another group is reached."""
        group = self._group[id(parameter)]
        if group != self._current:
            self._move(group)
        elif self._made_room:
            self._bring(group)
        return self._carrier.tensors(parameter)

    def make_room(self) -> None:
        """Lets all groups go that do not stay, and what they lay in."""
        for group in self._here - self.staying:
            self._carrier.drop(group)
        self._here &= self.staying
        self._made_room = True
        self._carrier.release()

    def _move(self, group: int) -> None:
        self.moves += 1
        self.mistaken += group not in self._here
        self._after[self._before, self._current] = group
        self._before, self._current = self._current, group
        self._bring(group)

    def _bring(self, group: int) -> None:
        self._made_room = False
        for other in self._here - self.staying - {group}:  # first, so that no more than two are ever here
            self._carrier.drop(other)
        self._carrier.wait(group)
        self._here = (self._here & self.staying) | {group}
        following = self._following()
        if following is not None and following not in self._here:
            self._carrier.fetch(following)
            self._here.add(following)

    def _following(self) -> int | None:
        """The group that is expected after the current one; None: nothing is known."""
        expected = self._after.get((self._before, self._current))
        if expected is None:
            expected = self._current + (1 if self._current > self._before else -1)
        return expected if 0 <= expected < self._count else None


def resident_groups(count: int, resident: int) -> frozenset[int]:
    """Which of `count` groups stay where `resident` of them do: spread evenly."""
    resident = max(0, min(resident, count))
    return frozenset(n for n in range(count) if (n + 1) * resident // count > n * resident // count)


def layer_number(name: str) -> int | None:
    """The decoder layer that a parameter belongs to, by its name; None: to none."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def layer_groups(model: nn.Module) -> list[list[QuantisedParameter]]:
    """The quantised parameters of each decoder layer; those outside of layers are in none."""
    layers: dict[int, list[QuantisedParameter]] = {}
    for name, module in model.named_modules():
        number = layer_number(f"{name}.")
        if isinstance(module, QuantisedParameter) and number is not None:
            layers.setdefault(number, []).append(module)
    return [layers[number] for number in sorted(layers)]
