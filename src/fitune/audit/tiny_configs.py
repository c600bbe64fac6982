"""A tiny configuration of every model type that transformers maps to a causal language model.

Small sizes only: every feature of the type's default configuration stays on (norms of queries and keys, soft
caps, biases, tied embeddings, partial rotary, sinks, shared experts, multipliers, layer patterns), the audit's
48 tokens are longer than every window and chunk, and no head dimension, rank or ratio that differs in the
default becomes equal by chance. Dropout and noise on a router's input are the exception: they are 0, because a
comparison needs the same numbers twice (`phimoe` still draws its experts at random in training mode: seed it).
Types that are causal language models only by a switch (`is_decoder` of the BERT family, `causal` of XLM, `attn_type`
of XLNet, ...) have that switch set. Where a default cannot run at all, or leaves out the one kind of layer that all
its checkpoints have, `tiny_settings.OVERRIDES` says so beside the value that was put in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fitune.audit.tiny_settings import (
    EXPERTS,
    HEAD_DIMS,
    HEADS,
    KEY_VALUE_HEADS,
    LAYERS,
    OVERRIDES,
    SIZES,
    VOCABULARY,
)
from fitune.errors import FituneError, InputError

AUDIT_TOKENS = 48
MAXIMUM_LAYERS = 12
_HEAD_COUNT = 4
_TOKEN_IDS = ("_token_id", "_token_index")
_ROPE_ORIGIN = "original_max_position_embeddings"
_NOISE = ("dropout", "pdrop", "layerdrop", "input_jitter")

# Model type -> why it is no causal language model of text by itself. tests/audit holds each reason to the fact.
NOT_AUDITED: dict[str, str] = {
    "cpmant": (
        "not causal in transformers: its forward marks every token as context, which all tokens attend to both ways "
        "(changing the last token changes all logits)"
    ),
    "gemma3n": (
        "its image tower is a model of the package timm, which transformers does not bring along; "
        "its text decoder is audited as gemma3n_text"
    ),
    "gemma4_assistant": (
        "a draft head of gemma4: it takes no tokens but the main model's hidden states, keys and values"
    ),
    "gemma4_unified_assistant": (
        "a draft head of gemma4_unified: it takes no tokens but the main model's hidden states, keys and values"
    ),
    "musicgen": (
        "its tokens are audio codes in several codebooks at once, and AutoModelForCausalLM cannot build it from its "
        "own configuration (its class wants the decoder's alone)"
    ),
    "musicgen_melody": (
        "its tokens are audio codes in several codebooks at once, and AutoModelForCausalLM cannot build it from its "
        "own configuration (its class wants the decoder's alone)"
    ),
}


def model_types() -> list[str]:
    """Every model type that transformers maps to a causal language model, in its order."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default configuration of `model_type` with small sizes.

    Raises InputError where transformers maps no causal language model to that name.
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"the installed transformers has no causal language model of type {model_type!r}; "
            "`fitune models --audit` without --only lists those it has",
            where=model_type,
        )
    return _tiny(CONFIG_MAPPING[model_type], {}, {})


def layer_kinds(config: PretrainedConfig) -> dict[str, set[str]]:
    """Attribute -> the kinds of layer that it lists, for every list of words with one entry a layer."""
    layers = getattr(config, "num_hidden_layers", None)
    derived = {
        name: getattr(config, name, None) for name in ("layer_types", "layers_block_type", "layers_num_experts")
    }
    kinds = {}
    for name, value in {**vars(config), **derived}.items():
        if isinstance(value, (list, tuple)) and len(value) == layers and _is_pattern(name, value):
            kinds[name] = {str(kind) for kind in value}
    return kinds


def _is_pattern(name: str, value: list[Any] | tuple[Any, ...]) -> bool:
    return name == "layers_num_experts" or all(isinstance(kind, str) for kind in value)


def _tiny(
    config_class: type[PretrainedConfig], given: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PretrainedConfig:
    """`config_class(**given)` with small sizes and as few layers as show every kind of layer it has.

    `given` is what a composite configuration says about this part of it, `overrides` what we say last.
    """
    named = {**OVERRIDES.get(config_class.model_type, {}), **overrides}
    default = config_class(
        **given, **{name: named[name] for name in config_class.sub_configs_defaults if name in named}
    )
    settings = {**given, **_sizes(default, given), **named}
    for name in _fields(config_class):
        part = vars(default).get(name)
        if isinstance(part, PretrainedConfig):
            specification = config_class.sub_configs_defaults.get(name)
            settings[name] = _tiny(
                type(part), specification.init_kwargs if specification else {}, named.get(name, {})
            )
    layers = [name for name in LAYERS if name in _fields(config_class)]
    if not layers or named.keys() & set(layers):
        return config_class(**settings)
    wanted = layer_kinds(default)
    for count in range(2, MAXIMUM_LAYERS + 1):
        config = config_class(**{**settings, **dict.fromkeys(layers, count)})
        found = layer_kinds(config)
        if all(len(found.get(name, ())) >= len(kinds) for name, kinds in wanted.items()):
            return config
    raise FituneError(f"{config_class.__name__}: {MAXIMUM_LAYERS} layers do not show every kind of {wanted}")


def _fields(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Setting -> the value it has before anything is derived from the others."""
    return {field.name: field.default for field in dataclasses.fields(config_class) if field.init}


def _sizes(default: PretrainedConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The small values of all settings whose names decide them. What is None, and so derived, stays so."""
    written = {**_fields(type(default)), **given}

    def final(name: str) -> Any:
        # What was written first: an attribute that varies by layer cannot be read from the whole configuration.
        return written[name] if written.get(name) is not None else getattr(default, name, None)

    settings: dict[str, Any] = {}
    for name, value in written.items():
        if any(word in name for word in _NOISE) and isinstance(value, (int, float)):
            settings[name] = type(value)(0)
        elif name == "is_decoder":
            settings[name] = True
        elif isinstance(value, bool) or not isinstance(value, int) or name.endswith(_TOKEN_IDS):
            continue
        elif name in HEADS:
            settings[name] = _HEAD_COUNT
        elif name in KEY_VALUE_HEADS:
            settings[name] = _key_value_heads(value, final(KEY_VALUE_HEADS[name]))
        elif name in HEAD_DIMS:
            equal = value * (final(HEAD_DIMS[name]) or 0) == final("hidden_size")
            settings[name] = 16 if equal else 32
        elif name in EXPERTS and (final("n_group") or 1) > 1:
            settings[name] = 2 * SIZES["n_group"]
        elif name == "max_position_embeddings" and _ROPE_ORIGIN in (final("rope_parameters") or {}):
            continue  # the scaling of the rotary embedding goes by it
        elif name in SIZES:
            settings[name] = min(value, SIZES[name])
    return {**settings, **_special_tokens(default)}


def _key_value_heads(value: int, heads: int) -> int:
    """The same kind of attention: one head for each, one for all, or one for a group."""
    if value == heads:
        return _HEAD_COUNT
    return 1 if value == 1 else _HEAD_COUNT // 2


def _special_tokens(default: PretrainedConfig) -> dict[str, Any]:
    """Special tokens that lie outside the small vocabulary move to its end; those that differ stay different."""
    moved: dict[int, int] = {}

    def inside(token: int) -> int:
        return token if 0 <= token < VOCABULARY else moved.setdefault(token, VOCABULARY - 1 - len(moved))

    tokens: dict[str, Any] = {}
    for name in _fields(type(default)):
        value = vars(default).get(name)
        if not name.endswith(_TOKEN_IDS) or value is None:
            continue
        tokens[name] = [inside(token) for token in value] if isinstance(value, (list, tuple)) else inside(value)
    return tokens
