"""A model that takes no time, for what runs a benchmark's parts."""

from __future__ import annotations

import json
from pathlib import Path

import speed_inputs
from speed_cases import Case, Model

TINY = Model(
    "tiny",
    {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "tie_word_embeddings": True,
    },
    "nobody's",
)  # fmt: skip
ROWS, ROW_TOKENS = 2, 64
TINY_CASE = Case("tiny", "tiny", ROWS, ROW_TOKENS, 0, 0)


def tiny_inputs(folder: Path) -> speed_inputs.Inputs:
    """The tiny model and two steps of rows that are all different, without a tokenizer."""
    model = speed_inputs.model_folder(TINY, folder)
    inputs = speed_inputs.Inputs(TINY_CASE, model, folder / "steps.json", folder / "data.json", None, folder)
    trained = [False] + [True] * (ROW_TOKENS - 1)
    steps = [
        [{"tokens": [(7 * row + step + 3 * place * place) % 100 for place in range(ROW_TOKENS)], "trained": trained}
         for row in range(ROWS)]
        for step in range(2)
    ]  # fmt: skip
    inputs.steps.write_text(json.dumps(steps))
    inputs.data.write_text("[]")
    return inputs
