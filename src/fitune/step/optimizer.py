"""The optimizers, by the run file's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fitune.errors import InputError


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter], betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """`adamw` (torch's, 8 bytes of state a parameter) or `adamw8bit` (bitsandbytes', 2 bytes).

    The learning rate is set by every step. Raises InputError where bitsandbytes is asked for and not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
    if name != "adamw8bit":
        raise InputError(f"no optimizer called {name!r} (there are adamw and adamw8bit)", where="train.optimizer")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "adamw8bit comes from bitsandbytes, which is not installed; run: pip install bitsandbytes",
            where="train.optimizer",
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=0.0, betas=betas, weight_decay=weight_decay)
    return optimizer
