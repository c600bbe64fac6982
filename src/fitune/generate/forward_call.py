"""Calling a causal LM for generation: what its forward takes, and a frame that leaves no trace on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fitune.errors import FituneError


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The names that the causal LM's forward takes; adapters' wrappers are looked through."""
    inner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    return frozenset(inspect.signature(inner.forward).parameters)


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache with the layers that the model's config asks for."""
    return DynamicCache(config=model.config)


def slots_obstacle(model: nn.Module, capacity_tokens: int) -> str | None:
    """What about the model rules out slots and prefix sharing for sequences up to this length; None: nothing.

    Slots need keys and values of every past token, at columns the caller chooses, so: plain attention
    layers only (a sliding window is fine while no sequence outgrows it), and explicit positions.
    """
    parameters = forward_parameters(model)
    for needed in ("past_key_values", "position_ids", "attention_mask"):
        if needed not in parameters:
            return f"its forward takes no {needed}"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    for layer in new_cache(model).layers:
        if type(layer) is DynamicLayer:
            continue
        if type(layer) is DynamicSlidingWindowLayer:
            if capacity_tokens > layer.sliding_window:
                return f"its attention window of {layer.sliding_window} tokens is shorter than {capacity_tokens}"
            continue
        return f"its cache holds {type(layer).__name__}, which cannot be cut and repeated by columns"
    return None


def call(model: nn.Module, parameters: frozenset[str], tokens: Tensor, **inputs: Any) -> Tensor:
    """tokens [B, T] -> the last token's logits [B, V]; inputs the forward does not know are left out.

    `past_key_values` (updated in place), `attention_mask` [B, T so far] and `position_ids` [B, T] are the
    inputs; leaving out positions or a mask is right only for models that derive them (see the callers).
    """
    arguments = {name: value for name, value in inputs.items() if name in parameters}
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = 1
    if "use_cache" in parameters:
        arguments["use_cache"] = "past_key_values" in arguments
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return model(input_ids=tokens, **arguments).logits[:, -1]
    # The last tokens of B rows lie apart; torch's linear would copy the head's weight B times for such an input.
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        return model(input_ids=tokens, **arguments).logits[:, -1]
    finally:
        hook.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's training flag as it was afterwards.

    Not `torch.inference_mode`: a tensor that a module computes and keeps meanwhile (rotary tables, decoded
    weights) could never again take part in training. Callers that never train may wrap the call in it.
    """
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in trained:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    for parameter in model.parameters():
        return parameter.device
    raise FituneError("the model has no parameters, so it cannot generate")
