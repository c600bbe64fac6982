"""What `train_speed.py` measures: the models, the rows of tokens, and the settings that both sides train with.

Everything is data. A new case is a line in `CASES`; a new model is a line in `MODELS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RANK = 16
ALPHA = 32
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0  # both sides' default
SEED = 0

# The alpaca case, as users run it: our packed rows, one at a time (about as many tokens as four samples), and the
# peer's padded batches.
ROW_TOKENS = 1024
MICRO_BATCH = 1
PEER_BATCH_SAMPLES = 4
SAMPLES_PER_ROUND = 48


@dataclass(frozen=True)
class Model:
    """A model that both sides read from the same folder of 16-bit weights.

    Attributes:
        shape: a transformers configuration, whose weights are drawn at random; None: fitune's bundled model.
        origin: whose shape it is.
    """

    name: str
    shape: Mapping[str, Any] | None
    origin: str


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        rows, row_tokens: rows of so many tokens, every one trained but each row's first; 0: samples of a file.
        peer_bytes: what the peer's process was seen to need at most, without checkpointing and with it.
    """

    name: str
    model: str
    rows: int
    row_tokens: int
    peer_bytes: float
    peer_bytes_checkpointed: float

    @property
    def has_fixed_rows(self) -> bool:
        """Whether all steps are alike: then step times have a median, and losses can be compared."""
        return self.rows > 0


@dataclass(frozen=True)
class Variant:
    """A way in which transformers, PEFT and bitsandbytes document QLoRA.

    Attributes:
        autocast: bfloat16 autocast over a model that `prepare_model_for_kbit_training` widened to float32; without
            it everything but the adapter is bfloat16. The adapter is float32 in both, as PEFT's documentation
            advises for stable training (`autocast_adapter_dtype`, its default).
        checkpointing: each layer is computed again in the backward pass (`use_reentrant=False`).
        compiled: under `torch.compile`.
        float32: nothing is rounded to 16 bits, `bnb_4bit_compute_dtype` included; to compare losses with.
    """

    autocast: bool
    checkpointing: bool
    compiled: bool = False
    float32: bool = False

    @property
    def name(self) -> str:
        words = ["float32" if self.float32 else "bf16 autocast" if self.autocast else "pure bf16"]
        words += ["checkpointing"] if self.checkpointing else []
        words += ["torch.compile"] if self.compiled else []
        return ", ".join(words)


VARIANTS = (Variant(False, False), Variant(True, False), Variant(False, True), Variant(True, True))
# Where a processor has no bfloat16 instructions, torch's bfloat16 products are many times slower than float32's.
FLOAT32_VARIANTS = (Variant(False, False, float32=True), Variant(False, True, float32=True))

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}

MODELS = {
    model.name: model
    for model in (
        Model("smollm2-135m", None, "SmolLM2-135M-Instruct, its Q4_1 file's weights in 16 bits"),
        Model(
            "llama-1.1b",
            _LLAMA | {
                "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
                "tie_word_embeddings": False,
            },
            "TinyLlama 1.1B: https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0/blob/main/config.json",
        ),
        Model(
            "gemma-2-layers",
            {
                "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_size": 2048,
                "intermediate_size": 16384, "num_hidden_layers": 2, "num_attention_heads": 8,
                "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
                "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            },
            "2 of the 18 layers of Gemma 2B: https://huggingface.co/google/gemma-2b/blob/main/config.json",
        ),
        Model(
            "qwen-6-layers",
            {
                "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
                "intermediate_size": 4864, "num_hidden_layers": 6, "num_attention_heads": 14,
                "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            },
            "6 of the 24 layers of Qwen2.5 0.5B: https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json",
        ),
        Model(
            "gqa-2-layers",
            _LLAMA | {
                "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192,
                "tie_word_embeddings": False,
            },
            "2 of the 32 layers of Mistral 7B: https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json",
        ),
    )
}  # fmt: skip

CASES = {
    case.name: case
    for case in (
        Case("smollm2-4x512", "smollm2-135m", 4, 512, 6.6e9, 4.2e9),
        Case("llama1b-2x512", "llama-1.1b", 2, 512, 8.8e9, 5.0e9),
        Case("smollm2-1x2048", "smollm2-135m", 1, 2048, 6.6e9, 4.2e9),
        Case("llama1b-1x2048", "llama-1.1b", 1, 2048, 12.8e9, 7.4e9),
        Case("alpaca", "smollm2-135m", 0, 0, 7.0e9, 5.0e9),
        Case("gemma-2x512", "gemma-2-layers", 2, 512, 10.0e9, 10.0e9),
        Case("qwen-2x512", "qwen-6-layers", 2, 512, 6.0e9, 5.0e9),
        Case("gqa-2x512", "gqa-2-layers", 2, 512, 5.0e9, 4.5e9),
    )
}
QUICK_CASES = ("smollm2-4x512", "llama1b-2x512")


def chosen_cases(names: Sequence[str], has_alpaca: bool) -> list[Case]:
    """The cases of these names; of none: all that can be measured.

    Raises ValueError for a name that is not there, and for alpaca without its file.
    """
    if not names:
        return [case for case in CASES.values() if case.has_fixed_rows or has_alpaca]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"no case called {', '.join(unknown)} (there are {', '.join(CASES)})")
    chosen = [CASES[name] for name in dict.fromkeys(names)]
    if not has_alpaca and not all(case.has_fixed_rows for case in chosen):
        raise ValueError("the case alpaca needs --alpaca FILE")
    return chosen
