"""Generation for models whose cache has no addressable columns: batches whose rows advance in lockstep.

State-space and hybrid models, and attention windows shorter than the sequences, keep a state that a shared
prefix cannot be cut from. They run as transformers itself would run them, in the first `Way` that gives the
same logits as whole forwards without a cache (`path_proof` finds out which that is).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from fitune.errors import FituneError
from fitune.generate.forward_call import device_of, forward, forward_parameters, new_cache
from fitune.generate.generation import Generation, GenerationPath, GenerationStats, Progress
from fitune.generate.sampling import Chooser


@dataclass(frozen=True, slots=True)
class Way:
    """How rows in lockstep are computed.

    Attributes:
        path: "padded": rows of unequal length share a batch, padded on the left; "equal lengths": only rows of the
            same length do; "one by one" and "uncached": no rows do.
        cache: "ours", of the kinds of layer that the config asks for; "own", made by the model and handed back
            to it; or "none".
        told: the model is told the mask and the positions; else it makes them by itself.
        name: for messages.
    """

    path: GenerationPath
    cache: Literal["ours", "own", "none"]
    told: bool
    name: str


PADDED = Way("padded", "ours", told=True, name="left padding")
EQUAL_LENGTHS = Way("equal lengths", "ours", told=True, name="rows of one length")
UNTOLD = Way("equal lengths", "ours", told=False, name="such rows with positions of its own")
OWN_CACHE = Way("equal lengths", "own", told=False, name="a cache of its own")
ONE_BY_ONE = Way("one by one", "own", told=False, name="a cache of its own for one row")
UNCACHED = Way("uncached", "none", told=False, name="no cache")
_SELECTABLE = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
# From the fastest to the slowest; after them comes UNCACHED, which is right by definition.
CACHED_WAYS = (PADDED, EQUAL_LENGTHS, UNTOLD, OWN_CACHE, ONE_BY_ONE)


def generate_lockstep(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    batch_size: int,
    chooser: Chooser,
    stats: GenerationStats,
    on_progress: Progress | None,
    way: Way,
) -> list[Generation]:
    """As `generate_detailed`, for a model already in evaluation mode; keeps `stats` up to date."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    results: dict[int, Generation] = {}
    for numbers in _batches(order, prompts, batch_size, way):
        batch = _Batch(model, [prompts[number] for number in numbers], numbers, pad_id, way, stats)
        results.update(batch.run(max_new_tokens, eos_ids, chooser))
        if on_progress is not None:
            on_progress(stats)
    return [results[number] for number in range(len(prompts))]


def _batches(order: list[int], prompts: Sequence[Sequence[int]], batch_size: int, way: Way) -> list[list[int]]:
    """Prompt numbers, longest first -> which of them are computed together."""
    groups = [order]
    if way.path != "padded":
        groups = [list(group) for _, group in groupby(order, key=lambda number: len(prompts[number]))]
    rows = batch_size if way.path in ("padded", "equal lengths") else 1
    return [group[start : start + rows] for group in groups for start in range(0, len(group), rows)]


class LockstepRows:
    """Some rows of tokens [B, T] on their way through the model, `mask` [B, T] being 0 where they are padding."""

    def __init__(self, model: nn.Module, way: Way, tokens: Tensor, mask: Tensor) -> None:
        self.model = model
        self.way = way
        self.tokens = tokens
        self.mask = mask
        self.parameters = forward_parameters(model)
        self.device = device_of(model)
        self.cache = new_cache(model) if way.cache == "ours" else None
        self.carried: dict[str, Any] = {}
        self._started = False

    def logits(self) -> Tensor:
        """The logits [B, V] that follow the rows as they are now."""
        new = self.tokens[:, -1:] if self._started and self.way.cache != "none" else self.tokens
        inputs: dict[str, Any] = {"use_cache": self.way.cache != "none", **self.carried}
        if self.way.told:
            positions = (self.mask.cumsum(dim=1) - 1).clamp_min(0)[:, -new.shape[1] :]
            inputs |= {"attention_mask": self.mask.to(self.device), "position_ids": positions.to(self.device)}
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        output = forward(self.model, self.parameters, new.to(self.device), **inputs)
        self._started = True
        if self.way.cache == "own":
            # Whatever state the output holds under the name by which the forward takes it.
            self.carried = {name: output[name] for name in output if name in self.parameters}
            if not self.carried:
                raise FituneError("the model's output holds no state to go on from")
        logits: Tensor = output.logits[:, -1]
        return logits

    def append(self, new_tokens: Sequence[int]) -> None:
        """One token more for every row."""
        new = torch.tensor(new_tokens, dtype=torch.long).unsqueeze(1)
        self.tokens = torch.cat([self.tokens, new], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=1)

    def can_drop_rows(self) -> bool:
        """Whether the cache can give up some rows."""
        if self.cache is None:
            return self.way.cache == "none"
        # Kinds of layer that keep more than these inherit a selection of rows that forgets what they add.
        return all(type(layer) in _SELECTABLE for layer in self.cache.layers)

    def keep(self, places: list[int]) -> None:
        """Drops all rows but these."""
        self.tokens, self.mask = self.tokens[places], self.mask[places]
        if self.cache is not None:
            self.cache.batch_select_indices(torch.tensor(places, device=self.device))


class _Batch:
    """Some prompts, decoded until all are done."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        pad_id: int,
        way: Way,
        stats: GenerationStats,
    ) -> None:
        self.numbers = list(numbers)
        self.pad_id = pad_id
        self.stats = stats
        longest = max(map(len, prompts))
        tokens = torch.tensor(
            [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.long
        )
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=torch.long
        )
        self.rows = LockstepRows(model, way, tokens, mask)

    def run(self, max_new_tokens: int, eos_ids: frozenset[int], chooser: Chooser) -> dict[int, Generation]:
        made: dict[int, list[int]] = {number: [] for number in self.numbers}
        results: dict[int, Generation] = {}
        started = time.perf_counter()
        logits = self.rows.logits()
        self.stats.computed_prompt_tokens += self.rows.tokens.numel()
        self.stats.prefill_seconds += time.perf_counter() - started
        started = time.perf_counter()
        while True:
            kept, next_tokens = [], []
            # Finished rows that could not leave the batch are chosen for too, and dropped here.
            for place, token in enumerate(chooser.choose(logits, self.numbers)):
                number = self.numbers[place]
                next_tokens.append(self.pad_id if number in results else token)
                if number in results:
                    continue
                if token not in eos_ids:
                    made[number].append(token)
                    self.stats.new_tokens += 1
                if token in eos_ids or len(made[number]) == max_new_tokens:
                    results[number] = Generation(tokens=made[number], finished=token in eos_ids)
                    chooser.forget(number)
                    self.stats.prompts_done += 1
                else:
                    kept.append(place)
            if not kept:
                break
            self.rows.append(next_tokens)
            if len(kept) < len(self.numbers) and self.rows.can_drop_rows():
                self.numbers = [self.numbers[place] for place in kept]
                self.rows.keep(kept)
            logits = self.rows.logits()
            self.stats.steps += 1
        self.stats.decode_seconds += time.perf_counter() - started
        return results
