"""Trained weights in groups: those that weight decay is not for, and those with a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, b_rate_ratio: float | None = None
) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them, each with its `weight_decay` and its `rate_ratio`.

    Vectors (biases, the scales of norms) do not decay: they do not overfit, and a scale is not meant to be small.
    With `b_rate_ratio` the B of every adapter learns at so many times the rate (LoRA+, arXiv 2402.12354).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decay = weight_decay if parameter.dim() > 1 else 0.0
            ratio = b_rate_ratio if b_rate_ratio is not None and ".lora_B." in name else 1.0
            groups.setdefault((decay, ratio), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "rate_ratio": ratio}
        for (decay, ratio), parameters in groups.items()
    ]
