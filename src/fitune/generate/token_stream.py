"""One continuation, token by token as they come: what a chat shows while the model is still speaking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fitune.generate.batch_generation import check_request
from fitune.generate.forward_call import context_tokens, rotary_switch_tokens, undisturbed
from fitune.generate.lockstep_generation import UNCACHED, LockstepRows, Way
from fitune.generate.path_proof import choose_way
from fitune.generate.sampling import TokenChooser


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """A prompt's tokens -> an iterator over the new tokens, the end token excluded.

    The same tokens as `generate` gives for this prompt alone. The model's training flags and autograd's mode
    are as found whenever the caller holds control, also if it stops half-way. Raises as `generate` does, the
    InputError at the call and not at the first token.
    """
    check_request(model, [prompt], max_new_tokens)
    chooser = TokenChooser(temperature, top_p, seed)
    return _tokens(model, list(prompt), max_new_tokens, frozenset(eos_ids), chooser)


def _tokens(
    model: nn.Module, prompt: list[int], max_new_tokens: int, eos_ids: frozenset[int], chooser: TokenChooser
) -> Iterator[int]:
    known = torch.tensor([prompt], dtype=torch.long)
    with undisturbed(model):
        way = _way(model, len(prompt), max_new_tokens)
    rows = LockstepRows(model, way, known, torch.ones_like(known))
    for number in range(max_new_tokens):
        with undisturbed(model):
            [token] = chooser.choose(rows.logits(), [0])
        if token in eos_ids:
            return
        yield token
        if number + 1 < max_new_tokens:
            rows.append([token])


def _way(model: nn.Module, prompt_tokens: int, max_new_tokens: int) -> Way:
    capacity = prompt_tokens + max_new_tokens
    switch = rotary_switch_tokens(model)
    if switch is not None and prompt_tokens <= switch < capacity:
        return UNCACHED
    way = choose_way(model, capacity, context_tokens(model), alone=True).way
    assert way is not None
    return way
