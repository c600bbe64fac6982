"""config.json: which architecture it names, what transformers makes of it, and what it did not understand."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fitune.models.checkpoint_files import first_line, read_json

# Text parts of multimodal models for which transformers has no causal language model of their own, and the one that
# computes the same on text alone: their rotary positions have three axes that are equal where there is no picture.
EQUIVALENT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# Keys of every model's config.json that say nothing of its architecture.
_PLAIN_KEYS = {
    "model_type", "auto_map", "quantization_config", "torch_dtype", "name_or_path", "use_cache",
    "transformers.js_config", "rope_theta",
    "rope_scaling", "partial_rotary_factor", "output_attentions", "attn_implementation", "use_bfloat16",
    "is_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads", "task_specific_params", "num_labels",
    "finetuning_task", "tokenizer_class", "prefix", "sep_token_id", "cross_attention_hidden_size", "torchscript",
    "unsloth_version", "unsloth_fixed", "pretraining_tp", "tf_legacy_loss", "decoder_start_token_id",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "compression_config",
    "is_llama_config", "max_window_layers", "aux_loss_alpha", "seq_aux", "ep_size",
}  # fmt: skip
# Keys that ask for nothing at this value. Phi-4-mini's files have them beside `Phi3ForCausalLM`, which reads neither
# (https://huggingface.co/microsoft/Phi-4-mini-instruct/blob/main/config.json).
_WITHOUT_EFFECT = {"full_attn_mod": 1, "interpolate_factor": 1}

# Names, with commas between, of keys that nobody understands and that are to be left out all the same.
ACCEPTED_KEYS = "FITUNE_ACCEPTED_CONFIG_KEYS"


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """What config.json says.

    Attributes:
        config: as transformers reads it, without its quantization_config.
        quantisation: that quantization_config, empty where the weights are plain.
        warnings: one sentence for each thing that was understood otherwise than it may be meant.
    """

    config: PretrainedConfig
    quantisation: dict[str, Any]
    warnings: list[str]


def read_config(folder: Path, problems: list[str]) -> ConfigFile | None:
    """config.json of `folder`; None, and one more of `problems`, where it cannot be used."""
    path = folder / "config.json"
    if not path.is_file():
        problems.append("config.json is missing")
        return None
    before = len(problems)
    written = read_json(path, problems)
    if len(problems) > before:
        return None
    quantisation = written.get("quantization_config") or written.get("compression_config") or {}
    if not isinstance(quantisation, dict):
        problems.append("config.json: quantization_config is not a JSON object")
        return None
    version = transformers.__version__
    model_type = written.get("model_type")
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a class of its own validates each family's fields
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            problems.append(_unknown_type(written))
        else:
            problems.append(f"config.json is refused by transformers {version}: {first_line(error)}")
        return None
    if text_type(config) is None and _is_multimodal(config):
        problems.append(
            f"{config.model_type} is multimodal, and transformers {version} has no causal language model for its "
            f"text decoder alone ({config.text_config.model_type})"
        )
        return None
    if text_type(config) is None and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        problems.append(_unknown_type(written))
        return None
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    warnings = _warnings(written, config, problems)
    return None if len(problems) > before else ConfigFile(config, quantisation, warnings)


def text_type(config: PretrainedConfig) -> str | None:
    """The model type that the text decoder of a multimodal model is built as; None where there is none."""
    if not _is_multimodal(config):
        return None
    found = config.text_config.model_type
    found = EQUIVALENT.get(found, found)
    return found if found in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def _is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a text decoder is one of several parts (some text models keep their fields in a text_config too)."""
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    return "text_config" in parts and len(parts) > 1


def _unknown_type(written: dict[str, Any]) -> str:
    model_type, version = written.get("model_type"), transformers.__version__
    if model_type is None:
        return "config.json has no model_type; it is not a model's configuration that transformers wrote"
    near = difflib.get_close_matches(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1, cutoff=0.7)
    hint = f" (nearest known: {near[0]!r})" if near else ""
    code = "; it wants code of its own (auto_map), and" if "auto_map" in written else ";"
    return (
        f"model_type {model_type!r} is no causal language model that transformers {version} carries{hint}{code} "
        "code that comes with a model is never run"
    )


def _warnings(written: dict[str, Any], config: PretrainedConfig, problems: list[str]) -> list[str]:
    """What was understood otherwise than it may be meant; keys that nobody understands are among the `problems`."""
    warnings = []
    if "auto_map" in written:
        warnings.append(
            "config.json names code of its own (auto_map); it is not run, "
            f"transformers' own {config.model_type} is used"
        )
    accepted = {name.strip() for name in os.environ.get(ACCEPTED_KEYS, "").split(",") if name.strip()}
    parts = {"": config} | {f"{name}.": getattr(config, name) for name in config.sub_configs if name == "text_config"}
    for prefix, part in parts.items():
        keys = written if not prefix else written.get(prefix.removesuffix("."))
        unknown = _unknown_keys(keys, part) if isinstance(keys, dict) else {}
        owner = f"{type(part).__name__} of transformers {transformers.__version__} does not know"
        ignored = [f"{prefix}{name}" for name in unknown if name in accepted]
        if ignored:
            warnings.append(f"config.json: {', '.join(ignored)}: {owner}; left out, as {ACCEPTED_KEYS} says")
        refused = {name: value for name, value in unknown.items() if name not in accepted}
        if refused:
            named = ", ".join(f"{prefix}{name} = {_short(value)}" for name, value in refused.items())
            problems.append(
                f"config.json has keys that {owner}: {named}; they may switch parts of the architecture. A newer "
                f"transformers may know them; if they do not matter, set {ACCEPTED_KEYS}={','.join(refused)}"
            )
    return warnings


def _unknown_keys(written: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Keys with a value that is neither absent nor off, and that neither the class nor its model's code mentions."""
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | _PLAIN_KEYS
    known |= set(config.sub_configs) | set(vars(GenerationConfig())) | set(dir(type(config)))
    if written.get("hidden_activation") == written.get("hidden_act"):
        known |= {"hidden_activation", "hidden_act"}  # what Gemma's files say twice
    unknown = {
        name: value
        for name, value in written.items()
        if name not in known
        and not name.startswith("_")
        and value is not None
        and value is not False
        and _WITHOUT_EFFECT.get(name) != value
    }
    # Not every key that is used is a field: older names are taken over, and models ask for keys that may be absent.
    code = _code_of(type(config)) if unknown else ""
    return {name: value for name, value in unknown.items() if not re.search(rf"\b{re.escape(name)}\b", code)}


def _code_of(kind: type[PretrainedConfig]) -> str:
    """The text of the files that define a configuration, its parents', and the models beside them."""
    folders = {
        Path(inspect.getfile(each)).parent
        for each in kind.__mro__
        if each.__module__.startswith("transformers.models.")
    }
    files = [
        file for folder in folders for form in ("configuration_*.py", "modeling_*.py") for file in folder.glob(form)
    ]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers logs about keys that it takes over; what matters of them is in our warnings."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
