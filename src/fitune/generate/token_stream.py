"""One continuation, token by token as they come: what a chat shows while the model is still speaking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fitune.generate.batch_generation import check_request
from fitune.generate.forward_call import call, device_of, forward_parameters, new_cache, undisturbed
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
    parameters = forward_parameters(model)
    device = device_of(model)
    cache = new_cache(model) if "past_key_values" in parameters else None
    known = torch.tensor([prompt], dtype=torch.long, device=device)
    tokens = known
    for _ in range(max_new_tokens):
        end = known.shape[1]
        inputs = {
            "attention_mask": torch.ones_like(known),
            "position_ids": torch.arange(end - tokens.shape[1], end, device=device).unsqueeze(0),
        }
        if cache is not None:
            inputs["past_key_values"] = cache
        with undisturbed(model):
            [token] = chooser.choose(call(model, parameters, tokens, **inputs), [0])
        if token in eos_ids:
            return
        yield token
        new = torch.tensor([[token]], dtype=torch.long, device=device)
        known = torch.cat([known, new], dim=1)
        tokens = known if cache is None else new
