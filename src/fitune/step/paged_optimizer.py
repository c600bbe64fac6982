"""An optimizer whose states, and the gradients, lie in a mapped file: memory holds a slice of them at a time.

AdamW changes every element by itself, so the ordinary optimizer, given a slice of a parameter, of its gradient and of
its states as if they were a parameter, does what it would do to the whole, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fitune.quant.moments import MOMENT_BLOCK
from fitune.step.fresh_states import Fresh
from fitune.step.paged_file import PagedFile, in_memory_order, place_bytes
from fitune.step.paged_gradients import SLICE, PagedGradients

assert SLICE % MOMENT_BLOCK == 0


class PagedOptimizer(torch.optim.Optimizer):
    """The learning rate is set by every step. Parameters and gradients are float32.

    `state` has the names and shapes of the ordinary optimizer's, so checkpoints of either go into the other.

    Args:
        inner: the ordinary optimizer, over no parameter of its own.
        fresh: a parameter's states before its first step.
        folder: where the file is made, on a disk with `paged_bytes` free.

    Attributes:
        gradients: of the parameters; they are not in `.grad`.

    Raises DiskFullError where the disk is too small.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, fresh: Fresh,
        parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], folder: Path,
    ) -> None:  # fmt: skip
        super().__init__(parameters, dict(inner.defaults))
        self._inner = inner
        self._fresh = fresh
        self._parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._file = PagedFile(folder, paged_bytes(fresh, self._parameters))
        self.gradients = PagedGradients(self._parameters, self._file)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Changes every parameter that has a gradient."""
        assert closure is None
        (inner,) = self._inner.param_groups
        # In this order: the backward pass made the first ones' gradients last, so they are still in the page cache.
        for group in self.param_groups:
            inner.update({name: value for name, value in group.items() if name != "params"})
            for parameter in group["params"]:
                if self.gradients.has(parameter):
                    for start in range(0, parameter.numel(), SLICE):
                        self._step_slice(parameter, start, min(start + SLICE, parameter.numel()), inner)
        inner["params"] = []

    def fresh_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The states of a parameter: those it has, or those from before its first step, which are its own then."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(self._fresh(parameter, self._file.zeros))
        return state

    def give_back(self, tensor: Tensor) -> None:
        """The memory of a state, where it lies in the file."""
        if self._file.holds(tensor):
            self._file.give_back(tensor)

    def close(self) -> None:
        """Removes the file, and all states with it."""
        self.gradients.close()
        self.state.clear()
        del self._file

    def _step_slice(self, parameter: nn.Parameter, start: int, stop: int, inner: dict[str, Any]) -> None:
        """Elements `start` to `stop` of a parameter, as they lie in memory."""
        state = self.fresh_state(parameter)
        piece = nn.Parameter(in_memory_order(parameter.detach())[start:stop])
        piece.grad = self.gradients.read(parameter, start, stop)
        parts = {name: _part(name, value, start, stop, parameter.numel()) for name, value in state.items()}
        inner["params"] = [piece]
        self._inner.state[piece] = parts
        self._inner.step()
        self._inner.state.clear()
        self.gradients.give_back(parameter, start, stop)
        for name, value in parts.items():
            if name != "step":
                self._file.give_back(value)
        if stop == parameter.numel():
            state["step"] = parts["step"]


def _part(name: str, value: Any, start: int, stop: int, count: int) -> Any:
    """What belongs to elements `start` to `stop` of a parameter's `count`.

    A state has a value for each element, or for each block of them; what counts the steps counts for every slice: a
    copy.
    """
    if name == "step":
        return value.clone() if isinstance(value, Tensor) else value
    flat = in_memory_order(value)
    block = 1 if flat.numel() == count else MOMENT_BLOCK
    return flat[start // block : -(-stop // block)]


def paged_bytes(fresh: Fresh, parameters: Sequence[Tensor]) -> int:
    """What a `PagedOptimizer` of such parameters needs on disk; they may lie on the meta device."""
    total = 0

    def count(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        nonlocal total
        total += place_bytes(shape, dtype)
        return torch.empty(shape, dtype=dtype, device="meta")

    for parameter in parameters:
        count(tuple(parameter.shape), dtype=parameter.dtype)  # the gradient
        fresh(parameter, count)
    return total
