"""Continuing many prompts at once with a transformers causal LM, as fast as the model alone allows.

A loop of our own instead of transformers' `generate`, for three reasons: the prefix that all prompts share
(in text-to-SQL the whole schema, most of every prompt) is computed once; a row that is done makes room for
the next prompt, so the batch stays full; and the cache is allocated once instead of copied for every token.
With temperature 0 the tokens are those of greedy search by whole forwards on each prompt alone (but for ties
within rounding: a batch sums in another order); models for which slots, padding or a cache would change them
run without (`path_proof`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fitune.errors import InputError
from fitune.generate.forward_call import context_tokens, rotary_switch_tokens, undisturbed
from fitune.generate.generation import Generation, GenerationStats, Progress
from fitune.generate.lockstep_generation import PADDED, UNCACHED, generate_lockstep
from fitune.generate.path_proof import Choice, choose_way
from fitune.generate.sampling import Chooser, TokenChooser
from fitune.generate.slot_generation import SlotBatch


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> list[list[int]]:
    """Prompts as token ids -> their continuations as token ids, in the same order.

    The continuations hold neither prompt, nor padding, nor the end token. See `generate_detailed`, which
    also says which of them ended by themselves, for the arguments and the errors.
    """
    detailed = generate_detailed(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        on_progress=on_progress,
    )
    return [generation.tokens for generation in detailed]


def generate_detailed(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> list[Generation]:
    """Prompts as token ids -> one `Generation` each, in the same order.

    The model is put into evaluation mode meanwhile and left as found, weights bit-identical.

    Args:
        model: any transformers causal LM. One whose cache cannot be addressed by columns (state-space and
            hybrid models, attention windows shorter than the sequences), or that a short proof finds wrong with
            it, takes a slower path; `GenerationStats.path` and `why_not_slots` say which and why.
        max_new_tokens: where a continuation that does not end is stopped.
        eos_ids: tokens that end a continuation; none: it always runs to `max_new_tokens`.
        pad_id: any valid token; fills rows up, is never seen by the others.
        batch_size: sequences decoded at a time; results do not depend on it.
        temperature, top_p, seed: see `TokenChooser`.
        on_progress: called with the same `GenerationStats` whenever prompts were completed.

    Raises:
        InputError: an empty prompt, a prompt that does not fit the model's context, a bad number.
        FituneError: the model's output is NaN.
    """
    check_request(model, prompts, max_new_tokens, batch_size)
    chooser = TokenChooser(temperature, top_p, seed)
    stats = GenerationStats(prompts=len(prompts), prompt_tokens=sum(map(len, prompts)))
    results: dict[int, Generation] = {}
    with undisturbed(model):
        for choice, numbers in _choices(model, prompts, max_new_tokens):
            stats.path = choice.path
            stats.why_not_slots = choice.reasons
            given = [prompts[number] for number in numbers]
            mine: Chooser = chooser if len(given) == len(prompts) else _Renumbered(chooser, numbers)
            ends = frozenset(eos_ids)
            if choice.way is None:
                batch = SlotBatch(model, given, max_new_tokens, ends, pad_id, mine, stats)
                found = batch.run(min(batch_size, len(given)), on_progress)
            else:
                found = generate_lockstep(
                    model, given, max_new_tokens, ends, pad_id, batch_size, mine, stats, on_progress, choice.way
                )  # fmt: skip
            results.update(zip(numbers, found, strict=True))
    return [results[number] for number in range(len(prompts))]


def _choices(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[tuple[Choice, list[int]]]:
    """Which prompts, by number, are generated in which way; the slowest way last."""
    switch = rotary_switch_tokens(model)
    below: list[int] = []
    above: list[int] = []
    across: list[int] = []
    for number, prompt in enumerate(prompts):
        if switch is None or len(prompt) + max_new_tokens <= switch:
            below.append(number)
        else:
            (above if len(prompt) > switch else across).append(number)

    def choose(numbers: list[int]) -> Choice:
        capacity = max(len(prompts[number]) for number in numbers) + max_new_tokens
        return choose_way(model, capacity, context_tokens(model))

    choices = []
    if below:
        choices.append((choose(below), below))
    why = f"its rotary embedding changes when a sequence grows beyond {switch} tokens"
    if above:
        # A shared prefix shorter than that would be computed with the other embedding.
        choice = choose(above)
        choices.append((choice if choice.way is not None else Choice(PADDED, why), above))
    if across:
        choices.append((Choice(UNCACHED, why), across))
    return choices


class _Renumbered:
    """A chooser for some of the prompts, whose numbers among these are not their own."""

    def __init__(self, chooser: Chooser, numbers: list[int]) -> None:
        self.chooser = chooser
        self.numbers = numbers

    def choose(self, logits: Tensor, prompts: Sequence[int]) -> list[int]:
        return self.chooser.choose(logits, [self.numbers[prompt] for prompt in prompts])

    def forget(self, prompt: int) -> None:
        self.chooser.forget(self.numbers[prompt])


def check_request(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int = 1
) -> None:
    """Raises InputError, with every problem at once, for prompts or numbers that cannot be generated from."""
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if batch_size < 1:
        problems.append(f"batch_size is {batch_size}; it must be at least 1")
    context = context_tokens(model)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            problems.append(f"prompt {number} is empty; give at least one token (such as the model's begin token)")
        elif context is not None and len(prompt) + max_new_tokens > context:
            problems.append(
                f"prompt {number} has {len(prompt)} tokens, and with {max_new_tokens} new ones it outgrows "
                f"the model's context of {context}; shorten it or lower max_new_tokens"
            )
    if problems:
        raise InputError(problems)
