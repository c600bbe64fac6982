"""Cuts a forward and backward pass into stretches at the borders of its layers, and puts whole models together.

What a pass of the whole model takes follows from a pass of its first layers that show every kind: the stretches of
layers of one kind are alike. A layer's forward stretch reaches from the end of the layer before it to its own end,
its backward stretch from the moment its output's gradient is there to that of its input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fitune.plan.anatomy import Layers

T = TypeVar("T")
# Stands for what comes after the last layer.
AFTER = -1


@dataclass(frozen=True)
class Pass(Generic[T]):
    """What was measured in a forward and a backward pass: (layer, value) in the order it happened."""

    forward: list[tuple[int, T]]
    backward: list[tuple[int, T]]

    def whole(self, layers: Layers) -> tuple[list[T], list[T]] | None:
        """The stretches of the whole model's passes, where this was one of its first `layers.kept` layers.

        None where the layers did not run one after the other, so that nothing can be concluded.
        """
        if layers.path is None:
            return [value for _, value in self.forward], [value for _, value in self.backward]
        order = [*range(layers.kept), AFTER]
        back = [AFTER, *reversed(range(layers.kept))][: len(self.backward)]  # first layers may need no gradient
        if [layer for layer, _ in self.forward] != order or [layer for layer, _ in self.backward] != back:
            return None
        forward, backward = dict(self.forward), dict(self.backward)
        return (
            [*(forward[twin] for twin in layers.twins), forward[AFTER]],
            [backward[AFTER], *(backward[twin] for twin in reversed(layers.twins) if twin in backward)],
        )


def even_out(found: Pass[float], layers: Layers) -> Pass[float]:
    """The same with every layer's value replaced by the mean of its kind, as noise asks for."""

    def evened(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
        kinds: dict[int, list[float]] = defaultdict(list)
        for layer, value in values:
            kinds[_twin(layer, layers)].append(value)
        return [(layer, mean(kinds[_twin(layer, layers)])) for layer, _ in values]

    return Pass(evened(found.forward), evened(found.backward))


def _twin(layer: int, layers: Layers) -> int:
    return layer if layer == AFTER or layers.path is None else layers.twins[layer]


class LayerWatch(Generic[T]):
    """Runs passes of a model and measures the stretches between its layers' borders.

    Args:
        modules: the layers, in order.
        close: called at every border; what was measured since the last call.
    """

    def __init__(self, modules: Sequence[nn.Module], close: Callable[[], T]) -> None:
        self._close = close
        self._pass: Pass[T] = Pass([], [])
        self._back: int | None = None  # the layer whose backward stretch is running
        for number, module in enumerate(modules):
            module.register_forward_hook(self._forward_hook(number))

    def run(self, forward: Callable[[], Tensor]) -> Pass[T]:
        """One forward and backward pass of the loss that `forward` computes."""
        self._pass, self._back = Pass([], []), None
        loss = forward()
        self._pass.forward.append((AFTER, self._close()))
        self._back = AFTER
        loss.backward()
        self._pass.backward.append((self._back, self._close()))
        return self._pass

    def _forward_hook(self, number: int) -> Callable[..., None]:
        def ended(module: nn.Module, args: Any, output: Any) -> None:
            if self._back is not None:
                return  # computed again for its backward pass, and part of that
            self._pass.forward.append((number, self._close()))
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(self._backward_hook(number))
                    break

        return ended

    def _backward_hook(self, number: int) -> Callable[[Tensor], None]:
        def arrived(gradient: Tensor) -> None:
            assert self._back is not None
            self._pass.backward.append((self._back, self._close()))
            self._back = number

        return arrived


def layer_modules(graph: nn.Module, layers: Layers) -> list[nn.Module]:
    """The layers of a graph, cut or not; none where `layers` has no list."""
    if layers.path is None:
        return []
    found = graph.get_submodule(layers.path)
    assert isinstance(found, nn.ModuleList)
    return list(found)


def cut(graph: nn.Module, layers: Layers) -> None:
    """Drops all but the first `layers.kept` layers, in place."""
    if layers.path is None:
        return
    modules = graph.get_submodule(layers.path)
    assert isinstance(modules, nn.ModuleList)
    del modules[layers.kept :]
