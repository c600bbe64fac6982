"""Losses as functions of per-token log-probabilities and weights."""

from __future__ import annotations

from torch import Tensor


def supervised(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Sum of the negative log-probabilities [n], each times its weight [n]; the caller divides by their total."""
    return -(logprobs * weights).sum()
