"""The fastest way: every row in a slot of its own, the shared prefix computed once, rows refilled as they end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from fitune.generate.forward_call import call, device_of, forward_parameters, new_cache
from fitune.generate.generation import Generation, GenerationStats, Progress
from fitune.generate.sampling import Chooser
from fitune.generate.slot_cache import SlotCache

PREFILL_TOKENS = 1024  # rows x padded length of one prefill forward: bounds its activations
# Rows are padded to a multiple of this: the CPU library compiles each new shape of product, and keeps it for good.
PREFILL_STEP = 32
REFILL_SHARE = 4  # new prompts are let in when a quarter of the slots is free: a prefill of one row is wasteful


def shared_prefix_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, leaving each at least one of its own; 0 for one prompt."""
    if len(prompts) < 2:
        return 0
    # The common prefix of the smallest and the largest in dictionary order is common to all.
    smallest, largest = min(map(list, prompts)), max(map(list, prompts))
    limit = min(map(len, prompts)) - 1
    for place, (left, right) in enumerate(zip(smallest, largest, strict=False)):
        if left != right or place == limit:
            return min(place, limit)
    return limit


@dataclass(slots=True)
class _Row:
    """A prompt in a slot: its number, its newest token and the column for that, what it made so far."""

    prompt: int
    token: int
    column: int
    new_tokens: list[int] = field(default_factory=list)


class SlotBatch:
    """The loop over slots: let prompts in, take a step, let finished rows out."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_ids: frozenset[int],
        pad_id: int,
        chooser: Chooser,
        stats: GenerationStats,
    ) -> None:
        self.model = model
        self.parameters = forward_parameters(model)
        self.device = device_of(model)
        self.prompts = [list(prompt) for prompt in prompts]
        self.max_new_tokens = max_new_tokens
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.chooser = chooser
        self.stats = stats
        self.prefix: DynamicCache | None = None
        self.prefix_tokens = 0
        self.cache: SlotCache | None = None
        self.rows: list[_Row] = []
        self.capacity = max(map(len, prompts)) + max_new_tokens
        self.results: list[Generation | None] = [None] * len(prompts)

    def run(self, slots: int, on_progress: Progress | None) -> list[Generation]:
        # Prompts of similar length come in together, so their prefill needs little padding.
        waiting = sorted(range(len(self.prompts)), key=lambda number: len(self.prompts[number]))
        started = time.perf_counter()
        self._compute_prefix()
        self.stats.prefill_seconds += time.perf_counter() - started
        while waiting or self.rows:
            free = slots - len(self.rows)
            if waiting and (not self.rows or free >= max(1, slots // REFILL_SHARE)):
                started = time.perf_counter()
                incoming = [waiting.pop() for _ in range(min(free, len(waiting)))]
                self._admit(incoming, slots)
                self.stats.prefill_seconds += time.perf_counter() - started
            started = time.perf_counter()
            done_before = self.stats.prompts_done
            self._step()
            self.stats.decode_seconds += time.perf_counter() - started
            if on_progress is not None and self.stats.prompts_done > done_before:
                on_progress(self.stats)
        if self.cache is not None:
            self.cache.layers.clear()  # layers and cache refer to each other: they would wait for the collector
        return [result for result in self.results if result is not None]

    def _compute_prefix(self) -> None:
        self.prefix_tokens = self.stats.shared_prefix_tokens = shared_prefix_tokens(self.prompts)
        if self.prefix_tokens:
            self.prefix = new_cache(self.model)
            self._prefill(self.prefix, [self.prompts[0][: self.prefix_tokens]], 0, whole=True)

    def _prefill(self, cache: DynamicCache, rows: list[list[int]], start: int, whole: bool = False) -> None:
        """Runs rows of tokens, right-padded, through the model from column `start` on; fills the cache.

        `whole`: without a column more than the longest row has.

        What padding leaves in the cache lies after a row's own columns: masked, then overwritten.
        """
        longest = max(map(len, rows))
        if not whole:
            longest = min(-(-longest // PREFILL_STEP) * PREFILL_STEP, self.capacity - start)
        tokens = torch.full((len(rows), longest), self.pad_id, dtype=torch.long)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor(row, dtype=torch.long)
        positions = torch.arange(start, start + longest).expand(len(rows), -1)
        call(
            self.model,
            self.parameters,
            tokens.to(self.device),
            past_key_values=cache,
            attention_mask=torch.ones(len(rows), start + longest, dtype=torch.long, device=self.device),
            position_ids=positions.to(self.device),
        )
        self.stats.computed_prompt_tokens += tokens.numel()

    def _admit(self, incoming: list[int], slots: int) -> None:
        """Prefills prompts, all but their last token, which is the first that the next step takes."""
        while incoming:
            longest = len(self.prompts[incoming[0]]) - self.prefix_tokens - 1
            count = max(1, PREFILL_TOKENS // max(1, longest))
            group, incoming = incoming[:count], incoming[count:]
            filled = new_cache(self.model)
            if self.prefix is not None:
                for layer, prefix in zip(filled.layers, self.prefix.layers, strict=True):
                    # A view: the first concatenation, at the next forward, makes the rows' own copies.
                    layer.update(
                        prefix.keys.expand(len(group), -1, -1, -1),
                        prefix.values.expand(len(group), -1, -1, -1),
                    )
            if longest > 0:
                rows = [self.prompts[number][self.prefix_tokens : -1] for number in group]
                self._prefill(filled, rows, self.prefix_tokens)
            if self.cache is None:
                self.cache = SlotCache(self._shape(filled, group[0]), slots, self.capacity)
                if self.prefix is not None:
                    self.cache.fill_prefix(self.prefix, self.prefix_tokens)
            if longest > 0:
                self.cache.admit(filled, len(self.rows), self.prefix_tokens)
            for number in group:
                prompt = self.prompts[number]
                self.rows.append(_Row(prompt=number, token=prompt[-1], column=len(prompt) - 1))

    def _shape(self, filled: DynamicCache, number: int) -> DynamicCache:
        """A cache with keys and values in every layer; prompts of one token leave none behind."""
        if filled.get_seq_length() > 0:
            return filled
        sample = new_cache(self.model)
        self._prefill(sample, [self.prompts[number][:1]], 0)
        return sample

    def _step(self) -> None:
        """One token for every active row; rows that are done leave, the last slot moving into their place."""
        assert self.cache is not None
        columns = [row.column for row in self.rows]
        self.cache.begin_step(columns)
        positions = torch.tensor(columns, dtype=torch.long).unsqueeze(1)
        mask = (torch.arange(self.cache.length) <= positions).long()
        logits: Tensor = call(
            self.model,
            self.parameters,
            torch.tensor([[row.token] for row in self.rows], dtype=torch.long).to(self.device),
            past_key_values=self.cache,
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
        )
        self.stats.steps += 1
        chosen = self.chooser.choose(logits, [row.prompt for row in self.rows])
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            row.token = chosen[slot]
            row.column += 1
            ended = row.token in self.eos_ids
            if not ended:
                row.new_tokens.append(row.token)
                self.stats.new_tokens += 1
            if ended or len(row.new_tokens) == self.max_new_tokens:
                self._leave(slot, finished=ended)

    def _leave(self, slot: int, finished: bool) -> None:
        assert self.cache is not None
        row = self.rows[slot]
        self.results[row.prompt] = Generation(tokens=row.new_tokens, finished=finished)
        self.chooser.forget(row.prompt)
        self.stats.prompts_done += 1
        last = self.rows.pop()
        if last is not row:
            self.cache.move(len(self.rows), slot, self.prefix_tokens, last.column)
            self.rows[slot] = last
