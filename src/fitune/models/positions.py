"""How many positions a model has, which bounds the length of its rows."""

from __future__ import annotations

from transformers import PretrainedConfig

from fitune.errors import InputError


def positions_of(config: PretrainedConfig) -> int | None:
    """Of its text part, where it has several; None where its configuration sets no limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_positions(tokens: int, config: PretrainedConfig, model: str) -> None:
    """Raises InputError where rows of so many tokens (data.max_tokens) are longer than `model` has positions."""
    limit = positions_of(config)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{tokens} is more than the {limit} positions of {model}. Take shorter rows; or, in a copy of the model, "
            "scale its positions (rope_parameters in config.json) and set max_position_embeddings to what they then "
            "reach",
            where="data.max_tokens",
        )
