"""The optimizers, by the run file's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fitune.errors import InputError
from fitune.step.adamw8bit import AdamW8bit


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter], betas: tuple[float, float], weight_decay: float, backend: str
) -> torch.optim.Optimizer:
    """`adamw` (torch's, 8 bytes of state a parameter) or `adamw8bit` (2 bytes; by the kernels of `backend`).

    The learning rate is set by every step.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
    if name == "adamw8bit":
        return AdamW8bit(parameters, betas, weight_decay, backend)
    raise InputError(f"no optimizer called {name!r} (there are adamw and adamw8bit)", where="train.optimizer")
