"""Generation for models whose cache has no addressable columns: left-padded batches, or no cache at all.

State-space and hybrid models, and attention windows shorter than the sequences, keep a state that a shared
prefix cannot be cut from. They run as transformers itself would run them: padding on the left, the cache
that their config asks for, finished rows leaving where every layer of the cache can give rows up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fitune.generate.forward_call import call, device_of, forward_parameters, new_cache
from fitune.generate.generation import Generation, GenerationStats, Progress
from fitune.generate.sampling import TokenChooser


def generate_padded(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    batch_size: int,
    chooser: TokenChooser,
    stats: GenerationStats,
    on_progress: Progress | None,
) -> list[Generation]:
    """As `generate_detailed`, for a model already in evaluation mode; keeps `stats` up to date."""
    cached = "past_key_values" in forward_parameters(model)
    stats.path = "padded" if cached else "uncached"
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    results: dict[int, Generation] = {}
    # Without a cache there is no state to keep apart, but also no way to know how padding is treated.
    rows = batch_size if cached else 1
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        batch = _PaddedBatch(model, [prompts[number] for number in numbers], numbers, pad_id, cached, stats)
        results.update(batch.run(max_new_tokens, eos_ids, chooser))
        if on_progress is not None:
            on_progress(stats)
    return [results[number] for number in range(len(prompts))]


class _PaddedBatch:
    """Some prompts, left-padded to one length, decoded until all are done."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        pad_id: int,
        cached: bool,
        stats: GenerationStats,
    ) -> None:
        self.model = model
        self.parameters = forward_parameters(model)
        self.device = device_of(model)
        self.numbers = list(numbers)
        self.pad_id = pad_id
        self.stats = stats
        self.cache = new_cache(model) if cached else None
        longest = max(map(len, prompts))
        self.tokens = torch.tensor(
            [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.long
        )
        self.mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=torch.long
        )

    def run(self, max_new_tokens: int, eos_ids: frozenset[int], chooser: TokenChooser) -> dict[int, Generation]:
        """Returns the prompts' numbers with their generations."""
        results: dict[int, Generation] = {}
        made: dict[int, list[int]] = {number: [] for number in self.numbers}
        self.stats.computed_prompt_tokens += self.tokens.numel()
        started = time.perf_counter()
        logits = self._forward(self.tokens)
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
            new = torch.tensor(next_tokens, dtype=torch.long).unsqueeze(1)
            self.tokens = torch.cat([self.tokens, new], dim=1)
            self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=1)
            if len(kept) < len(self.numbers) and self._rows_can_leave():
                self._keep(kept)
            logits = self._forward(self.tokens if self.cache is None else self.tokens[:, -1:])
            self.stats.steps += 1
        self.stats.decode_seconds += time.perf_counter() - started
        return results

    def _forward(self, tokens: Tensor) -> Tensor:
        positions = (self.mask.cumsum(dim=1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        inputs = {"attention_mask": self.mask.to(self.device), "position_ids": positions.to(self.device)}
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        return call(self.model, self.parameters, tokens.to(self.device), **inputs)

    def _rows_can_leave(self) -> bool:
        return self.cache is None or all(hasattr(layer, "batch_select_indices") for layer in self.cache.layers)

    def _keep(self, places: list[int]) -> None:
        self.numbers = [self.numbers[place] for place in places]
        self.tokens, self.mask = self.tokens[places], self.mask[places]
        if self.cache is not None:
            self.cache.batch_select_indices(torch.tensor(places, device=self.device))
