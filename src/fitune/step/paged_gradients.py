"""Gradients that go into a mapped file as soon as the backward pass has made them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fitune.step.paged_file import PagedFile, in_memory_order

# So many elements of a tensor are in memory at one time: 16 MiB of float32. A multiple of every block that an
# optimizer has (256 values share a peak) and of what torch gives a thread, so that slices change no bit.
SLICE = 1 << 22


class PagedGradients:
    """The gradients of `parameters`, in `file`: `.grad` is None except while a gradient is being taken over.

    Several backward passes add up. `norm`, `scale` and `clear` are those of step/gradients.py. A parameter that is
    used in several places gets its gradient once, because autograd adds up before it hands over.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], file: PagedFile) -> None:
        self._file = file
        self._places = [file.zeros((parameter.numel(),), dtype=parameter.dtype) for parameter in parameters]
        self._index = {parameter: index for index, parameter in enumerate(parameters)}
        self._norms: dict[int, Tensor] = {}  # of those that have a gradient
        self._factor = 1.0
        # The hooks live as long as the parameters: they must not keep the file.
        mine = weakref.ref(self)

        def take(parameter: Tensor) -> None:
            gradients = mine()
            if gradients is not None:
                gradients._take(parameter)

        self._hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in parameters]

    def norm(self) -> float:
        """The norm of all of them together, to the bit that of torch.nn.utils.get_total_norm."""
        norms = [self._norms[index] for index in sorted(self._norms)]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def scale(self, factor: float) -> None:
        """Multiplies all of them; it is done when they are read."""
        self._factor = factor

    def clear(self) -> None:
        """Forgets them."""
        self._norms.clear()
        self._factor = 1.0

    def first_non_finite(self) -> Tensor | None:
        """The first parameter whose gradient is not finite."""
        wrong = {index for index, norm in self._norms.items() if not bool(torch.isfinite(norm))}
        return next((parameter for parameter, index in self._index.items() if index in wrong), None)

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter got a gradient."""
        return self._index[parameter] in self._norms

    def read(self, parameter: nn.Parameter, start: int, stop: int) -> Tensor:
        """Elements of the parameter's gradient in the order of memory, scaled; not to be written to."""
        part = self._places[self._index[parameter]][start:stop]
        if self._factor == 1.0:
            return part
        scaled = part * self._factor
        self._file.give_back(part)
        return scaled

    def give_back(self, parameter: nn.Parameter, start: int, stop: int) -> None:
        """The memory of what `read` gave."""
        self._file.give_back(self._places[self._index[parameter]][start:stop])

    def close(self) -> None:
        """Leaves the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self.clear()
        self._places.clear()

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        if grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter).copy_(grad)
        index = self._index[parameter]
        flat, place = in_memory_order(grad), self._places[index]
        if index in self._norms:
            for start in range(0, flat.numel(), SLICE):
                part = place[start : start + SLICE]
                flat[start : start + SLICE].add_(part)
                self._file.give_back(part)
        # Of the whole, as it lies in memory: a norm of slices has other bits.
        self._norms[index] = torch.linalg.vector_norm(grad)
        for start in range(0, flat.numel(), SLICE):
            part = place[start : start + SLICE]
            part.copy_(flat[start : start + SLICE])
            self._file.give_back(part)
