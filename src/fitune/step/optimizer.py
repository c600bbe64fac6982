"""The optimizers, by the run file's names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.optimization import Adafactor

from fitune.errors import InputError
from fitune.step.adamw8bit import AdamW8bit
from fitune.step.fresh_states import ELEMENT_WISE, FRESH, in_memory
from fitune.step.lion import Lion
from fitune.step.paged_optimizer import PagedOptimizer

_NAMES = {AdamW8bit: "adamw8bit", Lion: "lion", Adafactor: "adafactor"}


# What each takes where a run file says nothing: torch's own for AdamW, for Lion those of its paper.
BETAS = {"adamw": (0.9, 0.999), "adamw8bit": (0.9, 0.999), "lion": (0.9, 0.99)}


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], betas: tuple[float, float] | None,
    weight_decay: float, backend: str, disk: Path | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """By name, with its bytes of state a parameter: `adamw` (torch's, 8), `adamw8bit` (2, by the kernels of
    `backend`), `lion` (4), `adafactor` (transformers', next to none).

    `parameters`: or groups of them, as `parameter_groups` makes. `betas`: None: the optimizer's own. The learning
    rate is set by every step. `disk`: a folder, for states and gradients in a file there and not in memory, to the
    same bits; raises DiskFullError where it has no room for them.
    """
    if name not in FRESH:
        raise InputError(f"no optimizer called {name!r} (there are {', '.join(FRESH)})", where="train.optimizer")
    if disk is not None:
        if name not in ELEMENT_WISE:
            raise InputError(f"{name} looks at whole matrices, not at slices of them", where="train.optimizer_states")
        inner = make_optimizer(name, [nn.Parameter(torch.empty(0))], betas, weight_decay, backend)
        return PagedOptimizer(inner, FRESH[name], parameters, disk)
    if name == "adafactor":
        # At the rate that is given, as transformers' Trainer has it, and not at one of its own by size and step.
        return Adafactor(parameters, lr=0.0, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    betas = betas or BETAS[name]
    if name == "lion":
        return Lion(parameters, betas, weight_decay)
    if name == "adamw8bit":
        return AdamW8bit(parameters, betas, weight_decay, backend)
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)


def states_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The states of a parameter, for a checkpoint's values to be put into: made, where it took no step yet."""
    if isinstance(optimizer, PagedOptimizer):
        return optimizer.fresh_state(parameter)
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        name = next((name for kind, name in _NAMES.items() if isinstance(optimizer, kind)), "adamw")
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
