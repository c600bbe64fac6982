"""Choosing the next token of every row: the likeliest one, or a draw from the nucleus.

A row's draws come from a generator of its own, seeded by the run's seed and the prompt's number, so what is
drawn for a prompt does not depend on the batch it happened to be in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fitune.errors import FituneError, InputError

PROMPT_STRIDE = 1_000_003  # a prime far above any batch: seeds of different prompts do not meet


class Chooser(Protocol):
    """What turns the last logits [B, V] of some rows, and the numbers of their prompts, into one token a row."""

    def choose(self, logits: Tensor, prompts: Sequence[int]) -> list[int]: ...

    def forget(self, prompt: int) -> None: ...


class TokenChooser:
    """Turns the last logits of some rows into tokens.

    Args:
        temperature: 0 takes the likeliest token; above 0 the logits are divided by it.
        top_p: only the likeliest tokens that together reach this probability are drawn from (1: all).
        seed: together with a prompt's number, fixes all its draws.

    Raises:
        InputError: temperature is negative, or top_p outside (0, 1].
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        problems = []
        if not 0 <= temperature < float("inf"):
            problems.append(f"temperature is {temperature}; it must be 0 (no sampling) or above")
        if not 0 < top_p <= 1:
            problems.append(f"top_p is {top_p}; it must be above 0 and at most 1")
        if problems:
            raise InputError(problems)
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self._generators: dict[int, torch.Generator] = {}

    def choose(self, logits: Tensor, prompts: Sequence[int]) -> list[int]:
        """logits [B, V] and the number of each row's prompt -> one token a row.

        Raises:
            FituneError: a row's logits hold NaN, so no token can be chosen.
        """
        likeliest = logits.max(dim=-1)
        if bool(torch.isnan(likeliest.values).any()):
            raise FituneError("the model's output is not a number (NaN); its weights or its arithmetic are broken")
        if self.temperature == 0:
            return likeliest.indices.tolist()
        draws = torch.cat([torch.rand(1, generator=self._generator(prompt)) for prompt in prompts])
        scaled = logits.float() / self.temperature
        probabilities, order = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True)
        reached = probabilities.double().cumsum(dim=-1)
        # A token belongs to the nucleus while the mass before it is below top_p; the first always does.
        kept = (reached - probabilities < self.top_p).sum(dim=-1, keepdim=True)
        mass = reached.gather(-1, kept - 1)
        target = draws.to(logits.device).double().unsqueeze(-1) * mass
        place = torch.searchsorted(reached, target, right=True).minimum(kept - 1)
        return order.gather(-1, place).squeeze(-1).tolist()

    def forget(self, prompt: int) -> None:
        """Drops the generator of a prompt that is complete."""
        self._generators.pop(prompt, None)

    def _generator(self, prompt: int) -> torch.Generator:
        if prompt not in self._generators:
            generator = torch.Generator()
            generator.manual_seed((self.seed * PROMPT_STRIDE + prompt) % 2**63)
            self._generators[prompt] = generator
        return self._generators[prompt]
