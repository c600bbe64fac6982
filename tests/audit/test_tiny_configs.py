"""Every tiny configuration is a causal language model with gradients, by plain transformers alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from fitune.audit.tiny_configs import AUDIT_TOKENS, NOT_AUDITED, layer_kinds, model_types, tiny_config
from fitune.audit.tiny_settings import OVERRIDES, SIZES
from fitune.errors import InputError

# Of each kind: plain, multi-query, windows and soft caps, chunks without rotary, experts, latent attention, sinks,
# linear attention, state space, shared blocks, a composite, learned positions, and a switch.
SAMPLE = (
    *("llama", "falcon", "gemma2", "gemma3", "llama4_text", "mixtral", "deepseek_v3", "gpt_oss"),
    *("qwen3_next", "mamba2", "zamba2", "qwen3_5", "gpt2", "bert"),
)
AUDITED = [name for name in model_types() if name not in NOT_AUDITED]
NOISE = ("dropout", "pdrop", "layerdrop")
SMALL_PARAMETERS = 3_000_000
# What a text alone never reaches: towers, attention to an encoder, and choices that have no gradient.
UNREACHED = (
    *("vision", "audio", "image", "img", "multi_modal", "projector", "visual", "embed_tokens_extend"),
    *("encoder_attn", "cross_attn", "crossattention", "indexer", "pooler"),
)


def model_of(config: PretrainedConfig) -> transformers.PreTrainedModel:
    """Random weights, and norms and biases that are not 1 and 0."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def tokens_of(changed_last: bool = False) -> Tensor:
    tokens = torch.randint(8, 200, (2, AUDIT_TOKENS), generator=torch.Generator().manual_seed(1))
    if changed_last:
        tokens[:, -1] = 207 - tokens[:, -1]
    return tokens


def logits_of(model: transformers.PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def prove(config: PretrainedConfig) -> None:
    """Small, finite, deterministic, causal, and with finite gradients on what a text reaches."""
    model = model_of(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < SMALL_PARAMETERS
    with torch.no_grad():
        logits = logits_of(model, tokens_of())
        again = logits_of(model, tokens_of())
        changed = logits_of(model, tokens_of(changed_last=True))
    assert logits.shape[:2] == (2, AUDIT_TOKENS)
    assert logits.isfinite().all()
    assert torch.equal(logits, again)
    assert torch.allclose(logits[:, :-1], changed[:, :-1], atol=1e-5, rtol=1e-5), "a token sees the future"
    assert not torch.allclose(logits[:, -1], changed[:, -1], atol=1e-5, rtol=1e-5), "the last token changes nothing"

    trained = logits_of(model.train(), tokens_of())
    torch.nn.functional.cross_entropy(trained[:, :-1].flatten(0, 1), tokens_of()[:, 1:].flatten()).backward()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    reached = {name: part for name, part in linears.items() if not any(word in name for word in UNREACHED)}
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    silent = [name for name, part in reached.items() if part.weight.grad is None or not part.weight.grad.any()]
    assert len(silent) < len(reached) / 2 or not reached, silent


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_is_proven(model_type: str) -> None:
    prove(tiny_config(model_type))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in AUDITED if name not in SAMPLE])
def test_every_other_type_is_proven(model_type: str) -> None:
    prove(tiny_config(model_type))


def test_a_model_without_its_switch_is_caught() -> None:
    config = tiny_config("bert")
    config.is_decoder = False
    with pytest.raises(AssertionError, match="sees the future"):
        prove(config)


def test_each_refusal_has_its_reason_in_fact() -> None:
    """When one of these starts to work, it belongs in the audit."""
    facts = {
        "cpmant": (AssertionError, "a token sees the future"),
        "gemma3n": (ImportError, "timm"),
        "gemma4_assistant": (ValueError, "inputs_embeds and shared_kv_states cannot be None"),
        "gemma4_unified_assistant": (ValueError, "inputs_embeds and shared_kv_states cannot be None"),
        "musicgen": (AttributeError, "MusicgenConfig"),
        "musicgen_melody": (AttributeError, "MusicgenMelodyConfig"),
    }
    assert facts.keys() == NOT_AUDITED.keys()
    for model_type, (kind, message) in facts.items():
        config = tiny_config(model_type)
        if "assistant" in model_type:
            config.text_config.num_kv_shared_layers = 0  # with the default, its text decoder cannot even be built
        with pytest.raises(kind, match=message):
            prove(config)


def test_music_is_several_codes_at_once() -> None:
    decoder = tiny_config("musicgen").decoder
    model = transformers.MusicgenForCausalLM(decoder)
    codes = torch.zeros(2 * decoder.num_codebooks, AUDIT_TOKENS, dtype=torch.long)
    assert decoder.num_codebooks > 1
    assert model(input_ids=codes, use_cache=False).logits.shape[:2] == (2 * decoder.num_codebooks, AUDIT_TOKENS)
    assert model(input_ids=codes, use_cache=False, output_hidden_states=True).hidden_states[-1].shape[0] == 2


def test_the_list_is_transformers_own() -> None:
    assert len(model_types()) == len(set(model_types())) > 180
    assert set(NOT_AUDITED) <= set(model_types())
    assert set(SAMPLE) <= set(AUDITED)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(InputError, match="no causal language model of type 'lama'"):
        tiny_config("lama")


def parts(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """A configuration and, by name, those inside it."""
    found = {"": config}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found.update({f"{name}.{inner}".rstrip("."): part for inner, part in parts(value).items()})
    return found


def features(config: PretrainedConfig) -> dict[str, Any]:
    """Settings that are no sizes: switches, names and factors; for what can be absent, whether it is there.

    What is None until it is derived from the sizes is compared only where it is a word.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = vars(config).get(field.name)
        if isinstance(value, str) or (isinstance(value, (bool, float)) and field.default is not None):
            found[field.name] = value
        elif (value is None or isinstance(value, int)) and field.default is not None:
            found[field.name] = value is None
    return found


@pytest.mark.parametrize("model_type", AUDITED)
def test_only_sizes_differ_from_the_default(model_type: str) -> None:
    default, tiny = parts(CONFIG_MAPPING[model_type]()), parts(tiny_config(model_type))
    assert default.keys() == tiny.keys()
    for name, part in default.items():
        outer = OVERRIDES.get(model_type, {}).get(name, {})
        said = {*OVERRIDES.get(part.model_type, {}), *outer, "is_decoder"}
        before, after = features(part), features(tiny[name])
        differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        assert {key for key in differing - said if not any(word in key for word in NOISE)} == set(), name
        kinds = layer_kinds(tiny[name])
        for listing, wanted in layer_kinds(part).items():
            found = kinds.get(listing, set())
            assert listing in said or found >= wanted or listing == "layers_num_experts", (name, listing)


@pytest.mark.parametrize("model_type", AUDITED)
def test_no_window_holds_the_whole_sequence(model_type: str) -> None:
    windows = {name for name in SIZES if "window" in name or "chunk" in name or name == "index_topk"}
    for name, part in parts(tiny_config(model_type)).items():
        for window in windows & vars(part).keys():
            assert vars(part)[window] is None or vars(part)[window] < AUDIT_TOKENS, (name, window)
