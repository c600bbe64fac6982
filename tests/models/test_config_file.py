from __future__ import annotations

import json
from pathlib import Path

import pytest

from fitune.models.config_file import ACCEPTED_KEYS, read_config
from tiny_models import FAMILIES, config_of


def written(folder: Path, family: str = "llama", **changed: object) -> Path:
    folder.mkdir(exist_ok=True)
    config_of(family).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_needs_no_warning(tmp_path: Path, family: str) -> None:
    problems: list[str] = []
    found = read_config(written(tmp_path / "model", family), problems)
    assert problems == []
    assert found is not None
    assert found.warnings == []
    assert found.quantisation == {}


def test_keys_of_published_configurations_need_no_warning(tmp_path: Path) -> None:
    """Fields as published models have them, older names and keys that only the model's code reads among them."""
    common = {
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "rope_theta": 1e6,
        "_name_or_path": "x",
        "do_sample": True,
        "transformers_version": "4.31.0",
    }
    own = {
        "llama": {"pretraining_tp": 1, "rope_scaling": None, "mlp_bias": False, "attention_bias": False},
        "qwen2": {"use_mrope": False, "use_sliding_window": False, "max_window_layers": 2, "sliding_window": None},
        "mistral": {"sliding_window": 4096, "attention_dropout": 0.0},
        "gemma": {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
        "gemma3_text": {"sliding_window_pattern": 6, "rope_local_base_freq": 10000, "cache_implementation": "hybrid"},
        "qwen3_moe": {"head_dim": 16, "decoder_sparse_step": 1, "max_window_layers": 48},
        "smollm3": {"no_rope_layer_interval": 4, "max_window_layers": 28},
        "phi3": {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "embd_pdrop": 0.0},
    }
    for family, fields in own.items():
        (tmp_path / family).mkdir()
        (tmp_path / family / "config.json").write_text(json.dumps({"model_type": family, **common, **fields}))
        found = read_config(tmp_path / family, [])
        assert found is not None
        assert found.warnings == []


def test_keys_that_nobody_understands_are_refused_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "m", use_gated_attention=True, logit_cap=30.0, off=False, empty=None)
    problems: list[str] = []
    assert read_config(folder, problems) is None
    (problem,) = problems
    assert "LlamaConfig" in problem
    assert "use_gated_attention = True, logit_cap = 30.0;" in problem
    assert problem.endswith("set FITUNE_ACCEPTED_CONFIG_KEYS=use_gated_attention,logit_cap")
    monkeypatch.setenv(ACCEPTED_KEYS, "logit_cap")
    problems = []
    assert read_config(folder, problems) is None
    assert "logit_cap" not in problems[0]
    monkeypatch.setenv(ACCEPTED_KEYS, "use_gated_attention, logit_cap")
    found = read_config(folder, [])
    assert found is not None
    (warning,) = found.warnings
    assert warning.startswith("config.json: use_gated_attention, logit_cap: LlamaConfig")


def test_a_key_without_effect_is_refused_at_another_value(tmp_path: Path) -> None:
    problems: list[str] = []
    assert read_config(written(tmp_path / "m", full_attn_mod=2, interpolate_factor=1), problems) is None
    assert "full_attn_mod = 2;" in problems[0]
    assert "interpolate_factor" not in problems[0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "qwen9"}, "(nearest known: 'qwen"),
        ({"model_type": "chatglm", "auto_map": {"AutoConfig": "x.Y"}}, "wants code of its own (auto_map), and code"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": "vit"}, "'vit' is no causal language model"),
        ({"hidden_size": "many"}, "config.json is refused by transformers"),
        ({"quantization_config": [1]}, "quantization_config is not a JSON object"),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path: Path, changed: dict[str, object], words: str) -> None:
    problems: list[str] = []
    assert read_config(written(tmp_path / "model", **changed), problems) is None
    assert len(problems) == 1
    assert words in problems[0]


def test_code_beside_a_known_architecture_is_not_run(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    found = read_config(folder, [])
    assert found is not None
    assert found.warnings == [
        "config.json names code of its own (auto_map); it is not run, transformers' own llama is used"
    ]
