"""Calling a causal LM for generation: what its forward takes, and a frame that leaves no trace on it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fitune.errors import FituneError


def inner_model(model: nn.Module) -> nn.Module:
    """The causal LM itself, out of an adapter's wrapper."""
    inner: nn.Module = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    return inner


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The names that the causal LM's forward takes; adapters' wrappers are looked through."""
    return frozenset(inspect.signature(inner_model(model).forward).parameters)


def text_config(model: nn.Module) -> Any:
    """The part of the model's config that is about text."""
    config = inner_model(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_tokens(model: nn.Module) -> int | None:
    """How many positions the model knows; None: no such limit is given."""
    given = getattr(text_config(model), "max_position_embeddings", None)
    return given if isinstance(given, int) and given > 0 else None


def rotary_switch_tokens(model: nn.Module) -> int | None:
    """Beyond how many tokens the rotary embedding takes other frequencies, for earlier tokens too; None: never.

    So "longrope" (arXiv 2402.13753, as transformers builds it). Keys cached before the switch are not those after.
    """
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = [
        kind.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min((limit for limit in limits if limit), default=None)


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
    try:
        layers = new_cache(model).layers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"its config describes no cache ({error})"
    for layer in layers:
        if type(layer) is DynamicLayer:
            continue
        if type(layer) is DynamicSlidingWindowLayer:
            if capacity_tokens > layer.sliding_window:
                return f"its attention window of {layer.sliding_window} tokens is shorter than {capacity_tokens}"
            continue
        return f"its cache holds {type(layer).__name__}, which cannot be cut and repeated by columns"
    return None


def indexer_obstacle(model: nn.Module, capacity_tokens: int) -> str | None:
    """Why sequences up to this length need passes without a cache; None: an indexer rules none out.

    An indexer scores the past tokens, of which a layer attends to the best only.
    Scores are cut at 0, so they tie, and which of equal ones are taken depends on the shape of the product: with a
    cache transformers itself attends to other tokens than without.
    """
    try:
        indexed = any(hasattr(layer, "update_indexer") for layer in new_cache(model).layers)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if not indexed:
        return None
    for name, value in text_config(model).to_dict().items():
        if re.match(r"index\w*top_?k$", name) and isinstance(value, int) and value < capacity_tokens:
            return f"it attends to the {value} best-scored tokens, where equal scores fall otherwise with a cache"
    return None


def call(model: nn.Module, parameters: frozenset[str], tokens: Tensor, **inputs: Any) -> Tensor:
    """tokens [B, T] -> the last token's logits [B, V]; as `forward`."""
    logits: Tensor = forward(model, parameters, tokens, use_cache="past_key_values" in inputs, **inputs).logits[:, -1]
    return logits


def forward(model: nn.Module, parameters: frozenset[str], tokens: Tensor, last_tokens: int = 1, **inputs: Any) -> Any:
    """tokens [B, T] -> the model's output, with the logits of the last tokens at least [B, >= last_tokens, V].

    Inputs that the forward does not know are left out: `past_key_values` (updated in place), `attention_mask`
    [B, T so far], `position_ids` [B, T], `use_cache`. Leaving out positions or a mask is right only for models
    that derive them (see the callers).
    """
    arguments = {name: value for name, value in inputs.items() if name in parameters}
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = last_tokens
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return model(input_ids=tokens, **arguments)
    # The last tokens of B rows lie apart; torch's linear would copy the head's weight B times for such an input.
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        return model(input_ids=tokens, **arguments)
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
