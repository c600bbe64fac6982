"""A model's own dropout: which fields of its configuration say it, and setting it for a run."""

from __future__ import annotations

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
