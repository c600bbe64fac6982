"""The optimizers, by the run file's names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.errors import InputError
from fitune.step.adamw8bit import AdamW8bit
from fitune.step.fresh_states import FRESH, in_memory
from fitune.step.paged_optimizer import PagedOptimizer


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], betas: tuple[float, float],
    weight_decay: float, backend: str, disk: Path | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """`adamw` (torch's, 8 bytes of state a parameter) or `adamw8bit` (2 bytes; by the kernels of `backend`).

    `parameters`: or groups of them, as `parameter_groups` makes. The learning rate is set by every step. `disk`: a
    folder, for states and gradients in a file there and not in memory, to the same bits; raises DiskFullError where
    it has no room for them.
    """
    if disk is not None and name in FRESH:
        inner = make_optimizer(name, [nn.Parameter(torch.empty(0))], betas, weight_decay, backend)
        return PagedOptimizer(inner, FRESH[name], parameters, disk)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
    if name == "adamw8bit":
        return AdamW8bit(parameters, betas, weight_decay, backend)
    raise InputError(f"no optimizer called {name!r} (there are adamw and adamw8bit)", where="train.optimizer")


def states_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The states of a parameter, for a checkpoint's values to be put into: made, where it took no step yet."""
    if isinstance(optimizer, PagedOptimizer):
        return optimizer.fresh_state(parameter)
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        name = "adamw8bit" if isinstance(optimizer, AdamW8bit) else "adamw"
        state.update(FRESH[name](parameter, in_memory(parameter.device)))
    return state


def give_back(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> None:
    """The memory of a state that lies on disk; others stay."""
    if isinstance(optimizer, PagedOptimizer):
        optimizer.give_back(tensor)


def close(optimizer: torch.optim.Optimizer) -> None:
    """Removes what the optimizer has on disk; its states are gone then."""
    if isinstance(optimizer, PagedOptimizer):
        optimizer.close()
