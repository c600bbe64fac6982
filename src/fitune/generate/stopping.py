"""Where an answer ends: the tokens on which generation stops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fitune.data.encoding import encoder_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fitune.models.source import ModelSource


def stop_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that closes the assistant's turns in the chat template, and those the model's makers name."""
    end_of_turn = encoder_for(tokenizer).template.end_of_turn_id()
    return sorted({*source.generation_eos_ids(), *([] if end_of_turn is None else [end_of_turn])})


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows up with; it is never seen."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id or 0)
