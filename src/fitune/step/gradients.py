"""The gradients of a step, wherever they lie: their norm, scaling them, forgetting them."""

from __future__ import annotations

from typing import Protocol

import torch

from fitune.step.paged_optimizer import PagedOptimizer


class Gradients(Protocol):
    """Of all parameters of an optimizer."""

    def norm(self) -> float:
        """The norm of all of them together."""

    def scale(self, factor: float) -> None:
        """Multiplies all of them."""

    def clear(self) -> None:
        """Forgets them."""

    def first_non_finite(self) -> torch.Tensor | None:
        """The first parameter whose gradient is not finite."""


class HeldGradients:
    """Gradients as autograd leaves them: in memory, each in its parameter's `.grad`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def norm(self) -> float:
        """0 where there are none."""
        return float(torch.nn.utils.get_total_norm(self._all()))

    def scale(self, factor: float) -> None:
        """In place."""
        for grad in self._all():
            grad.mul_(factor)

    def clear(self) -> None:
        """Frees them."""
        self._optimizer.zero_grad(set_to_none=True)

    def first_non_finite(self) -> torch.Tensor | None:
        """None where all are finite."""
        for parameter in self._parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return parameter
        return None

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _all(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._parameters() if parameter.grad is not None]


def gradients_of(optimizer: torch.optim.Optimizer) -> Gradients:
    """Where this optimizer looks for the gradients of its parameters."""
    return optimizer.gradients if isinstance(optimizer, PagedOptimizer) else HeldGradients(optimizer)
