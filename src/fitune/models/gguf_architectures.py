"""What a GGUF architecture is called in transformers: its configuration and its tensors' names.

An architecture that is not in `ARCHITECTURES`, a metadata field that changes the mathematics in a way the
configuration here cannot express, or a tensor without a place is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fitune.errors import InputError
from fitune.models.gguf_header import GGUFHeader

_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_CLASSIC_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3_LAYER = {**_CLASSIC_LAYER, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PHI3_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
# Precomputed rotary factors: read into the configuration instead of being a weight.
ROTARY_FACTORS = "rope_freqs.weight"
# Llama 3's published low and high frequency factors and original context (its `rope_scaling`).
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT_TOKENS = 1.0, 4.0, 8192


@dataclass(frozen=True)
class Architecture:
    """How files of one `general.architecture` are read.

    Attributes:
        model_type: transformers' name for it.
        model_class: the class that `config.architectures` names.
        layer_names: GGUF's part names inside a layer -> transformers'.
        has_permuted_rotary: query and key rows are stored interleaved, as llama.cpp's rotary wants them.
        extra_config: what this configuration has beyond the classic decoder's fields.
    """

    model_type: str
    model_class: str
    layer_names: dict[str, str]
    has_permuted_rotary: bool
    extra_config: Callable[[GGUFHeader], dict[str, Any]]


def find_architecture(header: GGUFHeader) -> Architecture:
    """Raises InputError for an architecture that is not read."""
    name = header.architecture
    if name not in ARCHITECTURES:
        found = f"architecture {name!r}" if name else "no architecture (general.architecture is missing)"
        raise InputError(
            f"{found}; GGUF files are read for {', '.join(sorted(ARCHITECTURES))}. "
            "Give the model's Hugging Face folder or hub name instead",
            where=header.path,
        )
    return ARCHITECTURES[name]


def config_fields(header: GGUFHeader, architecture: Architecture) -> dict[str, Any]:
    """Header -> keyword arguments of the transformers configuration (token ids and dtype excepted)."""
    problems = _unreadable(header)
    fields: dict[str, Any] = {}
    for field, key in (
        ("hidden_size", "embedding_length"),
        ("intermediate_size", "feed_forward_length"),
        ("num_hidden_layers", "block_count"),
        ("num_attention_heads", "attention.head_count"),
        ("max_position_embeddings", "context_length"),
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ):
        found = _of(header, key)
        if found is None:
            problems.append(f"{header.architecture}.{key} is missing from the metadata")
        elif not isinstance(found, int | float):
            problems.append(f"{header.architecture}.{key} differs between layers, which is not read")
        fields[field] = found
    if "token_embd.weight" not in header.tensors:
        problems.append("token_embd.weight is missing: the file holds no embeddings")
    if problems:
        raise InputError(problems, where=header.path)
    fields["rms_norm_eps"] = _shortest(fields["rms_norm_eps"])
    fields["num_key_value_heads"] = _of(header, "attention.head_count_kv") or fields["num_attention_heads"]
    # The metadata's vocabulary size may leave out padding rows; the matrix cannot.
    fields["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in header.tensors
    fields["rope_parameters"] = _rope(header)
    fields["architectures"] = [architecture.model_class]
    return fields | architecture.extra_config(header)


def hub_name(name: str, architecture: Architecture) -> str | None:
    """GGUF tensor name -> Hugging Face name; None where it has no place."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in architecture.layer_names:
        return f"model.layers.{layer[1]}.{architecture.layer_names[layer[2]]}.{kind}"
    return None


def _of(header: GGUFHeader, key: str) -> Any:
    return header.metadata.get(f"{header.architecture}.{key}")


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(np.format_float_scientific(np.float32(value)))


def _unreadable(header: GGUFHeader) -> list[str]:
    """Every stated property that would change the mathematics and is not covered here."""
    problems = []
    if _of(header, "expert_count"):
        problems.append(f"a mixture of {_of(header, 'expert_count')} experts; only dense models are read from GGUF")
    heads, width = _of(header, "attention.head_count"), _of(header, "embedding_length")
    rotary = _of(header, "rope.dimension_count")
    if isinstance(heads, int) and isinstance(width, int) and rotary is not None:
        head_dim = _of(header, "attention.key_length") or width // heads
        if rotary != head_dim:
            problems.append(
                f"rotary positions on {rotary} of {head_dim} head dimensions, which is not read from GGUF"
            )
    key, value = _of(header, "attention.key_length"), _of(header, "attention.value_length")
    if key and value and key != value:
        problems.append(f"key heads of {key} and value heads of {value} dimensions, which is not read from GGUF")
    scaling = _of(header, "rope.scaling.type") or "none"
    if scaling not in ("none", "linear"):
        problems.append(f"rotary scaling {scaling!r}; none and linear are read from GGUF")
    problems += [
        f"tensor {name}: long-context rotary factors are not read from GGUF"
        for name in header.tensors
        if name.startswith("rope_factors_")
    ]
    return problems


def _rope(header: GGUFHeader) -> dict[str, Any]:
    theta = _shortest(_of(header, "rope.freq_base") or 10000.0)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    factor = _of(header, "rope.scaling.factor") or _of(header, "rope.scale_linear")
    if _of(header, "rope.scaling.type") == "linear" and factor and factor != 1.0:
        parameters |= {"rope_type": "linear", "factor": float(factor)}
    if ROTARY_FACTORS in header.tensors:
        parameters |= _llama3_scaling(header, theta)
    return parameters


def _llama3_scaling(header: GGUFHeader, theta: float) -> dict[str, Any]:
    """The `llama3` scaling whose factors are those stored in the file, to 1e-4; anything else is refused."""
    entry = header.tensors[ROTARY_FACTORS]
    stored = np.fromfile(header.path, "<f4", math.prod(entry.shape), offset=entry.start_byte)
    factor = float(stored.max())
    wavelengths = 2 * math.pi * theta ** (np.arange(len(stored)) / len(stored))
    smooth = (_LLAMA3_CONTEXT_TOKENS / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    expected = 1 / (np.clip(smooth, 0, 1) + (1 - np.clip(smooth, 0, 1)) / factor)
    if not np.allclose(stored, expected, rtol=1e-4):
        raise InputError(
            f"tensor {ROTARY_FACTORS}: rotary factors that are not Llama 3's are not read from GGUF",
            where=header.path,
        )
    return {
        "rope_type": "llama3",
        "factor": _shortest(factor),
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT_TOKENS,
    }


def _head_dim(header: GGUFHeader) -> int:
    found = _of(header, "attention.key_length") or _of(header, "rope.dimension_count")
    return int(found or _of(header, "embedding_length") // _of(header, "attention.head_count"))


def _llama_config(header: GGUFHeader) -> dict[str, Any]:
    return {
        "head_dim": _head_dim(header),
        "attention_bias": any(re.search(r"\.attn_\w+\.bias$", name) for name in header.tensors),
        "mlp_bias": any(re.search(r"\.ffn_\w+\.bias$", name) for name in header.tensors),
    }


def _qwen2_config(header: GGUFHeader) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _qwen3_config(header: GGUFHeader) -> dict[str, Any]:
    return {"head_dim": _head_dim(header), "use_sliding_window": False}


def _phi3_config(header: GGUFHeader) -> dict[str, Any]:
    original = _of(header, "rope.scaling.original_context_length") or _of(header, "context_length")
    # llama.cpp writes a window of 0 for models that have none.
    return {
        "original_max_position_embeddings": original,
        "sliding_window": _of(header, "attention.sliding_window") or None,
    }


ARCHITECTURES = {
    # Mistral's files call themselves llama, and are: the converter drops nothing but an unused window.
    "llama": Architecture("llama", "LlamaForCausalLM", _CLASSIC_LAYER, True, _llama_config),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _CLASSIC_LAYER, False, _qwen2_config),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _QWEN3_LAYER, False, _qwen3_config),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _PHI3_LAYER, False, _phi3_config),
}
