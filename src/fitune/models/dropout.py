"""A model's own dropout: which fields of its configuration say it, and setting it for a run."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from fitune.errors import InputError

# Of heads that no causal language model has, of whole layers, and of what chooses experts.
_OTHERS = ("classifier", "summary", "layerdrop", "layer_drop", "router", "lora")


def dropout_of(config: PretrainedConfig) -> dict[str, float]:
    """Field of the (text) configuration -> its rate, for every dropout that the model has or could have."""
    found = config.get_text_config().to_dict()
    return {
        name: float(value)
        for name, value in sorted(found.items())
        if "drop" in name
        and not any(other in name for other in _OTHERS)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


def attention_dropout_of(config: PretrainedConfig) -> float:
    """Of the attention's weights: the highest rate of the fields that name it."""
    return max((rate for name, rate in dropout_of(config).items() if "att" in name), default=0.0)


def set_dropout(config: PretrainedConfig, rate: float | None) -> None:
    """Every dropout of the model becomes `rate`; None leaves them. Raises InputError where it has none."""
    if rate is None:
        return
    fields = dropout_of(config)
    if not fields and rate:
        raise InputError(
            f"a model of the type {config.model_type} has no dropout of its own; remove it, or take lora.dropout",
            where="train.model_dropout",
        )
    text = config.get_text_config()
    for name in fields:
        setattr(text, name, rate)


def told(config: PretrainedConfig) -> str:
    """`attn_pdrop 0.1, embd_pdrop 0.1`, those that are not zero; empty where all are."""
    return ", ".join(f"{name} {rate:g}" for name, rate in dropout_of(config).items() if rate)


def drops(module: nn.Module, apart_from: nn.Module | None = None) -> bool:
    """Whether a module, or one within it, drops any of its own numbers in training; an adapter's do not count.

    `apart_from`: a module within it that is not looked at.
    """
    left_out = set() if apart_from is None else set(apart_from.modules())
    for name, inner in module.named_modules():
        if inner in left_out or "lora_dropout" in name:
            continue
        if isinstance(inner, nn.modules.dropout._DropoutNd) and inner.p > 0:
            return True
        if any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(inner).items()):
            return True
    return False
