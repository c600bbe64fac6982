"""Going on with an adapter that is there: this program's, or one that PEFT made; LoRA+; groups of targets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_runs import adapter_bits, config_of, run, stop_after
from transformers import AutoModelForCausalLM

from fitune.errors import InputError, Interrupted
from fitune.step.parameter_groups import parameter_groups
from fitune.train.run import plan_run, prepare_run
from tiny_models import model_of

STILL = ("train.learning_rate=1e-30", "train.steps=1", "train.schedule=constant")


@pytest.fixture(scope="module")
def first(place: Path) -> Path:
    return run(config_of(place, "lora.rank=4", "lora.alpha=8"), place / "first").folder.path


def made_by_peft(place: Path, folder: Path, **settings: Any) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    adapted.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_run_begins_where_the_other_ended(place: Path, first: Path, tmp_path: Path, method: str) -> None:
    found = run(config_of(place, f"lora.start_from={first}", f"method={method}", *STILL), tmp_path / "run")
    before, after = tensors_of(first / "adapter"), tensors_of(tmp_path / "run" / "adapter")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = run(config_of(place, f"method={method}", *STILL), tmp_path / "fresh")
    assert found.losses[0][1] < fresh.losses[0][1] - 0.1
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_an_adapter_of_peft_is_gone_on_with_and_resumed(place: Path, tmp_path: Path) -> None:
    folder = made_by_peft(place, tmp_path / "theirs", r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    still = run(config_of(place, f"lora.start_from={folder}", "method=lora", *STILL), tmp_path / "still")
    before, after = tensors_of(folder), tensors_of(still.folder.adapter)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = config_of(place, f"lora.start_from={folder}")
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(3))
    run(config, tmp_path / "parts", resume=True)
    assert adapter_bits(tmp_path / "parts") == adapter_bits(tmp_path / "whole")
    save_file({name: value + 1 for name, value in before.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="adapter it started from changed"):
        run(config, tmp_path / "parts", resume=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"r": 4, "target_modules": ["q_proj"], "lora_bias": True}, "uses lora_bias"),
        ({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}, "layers_to_transform"),
        ({"r": 4, "target_modules": r".*layers\.0\.self_attn\.q_proj"}, "on some layers of the names q_proj"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(
    place: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    folder = made_by_peft(place, tmp_path / "theirs", **settings)
    with pytest.raises(InputError) as refused:
        run(config_of(place, f"lora.start_from={folder}"), tmp_path / "run")
    assert told in str(refused.value)


def test_settings_that_are_not_the_adapters_are_refused(place: Path, first: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lora.rank is 7, but the adapter's is 4"):
        run(config_of(place, f"lora.start_from={first}", "lora.rank=7"), tmp_path / "run")
    with pytest.raises(InputError, match="neither a run folder with an adapter nor an adapter"):
        run(config_of(place, f"lora.start_from={place}"), tmp_path / "run")
    with pytest.raises(InputError, match="no such folder"):
        config_of(place, "lora.start_from=nowhere")
    other = tmp_path / "other"
    shutil.copytree(first / "adapter", other)
    base = json.loads((other / "base.json").read_text())
    (other / "base.json").write_text(json.dumps({**base, "identity": "another"}))
    with pytest.raises(InputError, match="not on the model given"):
        run(config_of(place, f"lora.start_from={other}"), tmp_path / "run")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("states", ["memory", "disk"])
def test_the_rate_of_b_is_its_own(place: Path, tmp_path: Path, optimizer: str, states: str) -> None:
    """AdamW's first step moves every weight by its rate: B by 8 times as much, A not at all, as B is still zero."""
    settings = [
        "train.steps=1", "train.schedule=constant", "train.warmup_share=0", "train.learning_rate=0.001",
        f"train.optimizer={optimizer}", f"train.optimizer_states={states}", "train.max_grad_norm=1000000",
    ]  # fmt: skip
    plain = tensors_of(run(config_of(place, *settings), tmp_path / "plain").folder.adapter)
    plus = tensors_of(run(config_of(place, *settings, "lora.b_rate_ratio=8"), tmp_path / "plus").folder.adapter)
    for name in plain:
        if ".lora_B." in name:
            torch.testing.assert_close(plus[name], 8 * plain[name])
            assert plain[name].abs().max() > 0.0009
        else:
            assert torch.equal(plus[name], plain[name])


def test_vectors_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    groups = parameter_groups(model.named_parameters(), 0.1)
    decays = {parameter.dim(): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}
    assert sum(len(group["params"]) for group in groups) == 4


@pytest.mark.parametrize(("targets", "count"), [("attention", 8), ("mlp", 6), ("all-linear", 14)])
def test_groups_of_targets(place: Path, tmp_path: Path, targets: str, count: int) -> None:
    found = tensors_of(run(config_of(place, f"lora.targets={targets}", *STILL), tmp_path / "run").folder.adapter)
    assert len(found) == 2 * count
    parts = {name.split(".layers.")[1].split(".")[1] for name in found}
    assert parts == {"attention": {"self_attn"}, "mlp": {"mlp"}}.get(targets, {"self_attn", "mlp"})


PATTERNS = [
    "lora.rank=4",
    "lora.rank_pattern={q_proj: 2, 'layers.1.mlp.up_proj': 7}",
    "lora.alpha_pattern={q_proj: 3}",
]


def test_ranks_of_their_own(place: Path, tmp_path: Path) -> None:
    """They are in the adapter as PEFT reads it, in the plan, and in a run that goes on from it."""
    config = config_of(place, *PATTERNS, "train.steps=2")
    prepared = prepare_run(config)
    plan = plan_run(prepared, with_time=False)
    first = run(config, tmp_path / "first")
    found = tensors_of(first.folder.adapter)
    ranks = {name: value.shape[0] for name, value in found.items() if ".lora_A." in name}
    for name, rank in ranks.items():
        assert rank == (2 if "q_proj" in name else 7 if "1.mlp.up_proj" in name else 4)
    trained = {item.name: item.value for item in plan.memory}["trained weights"]
    assert trained == 4 * sum(value.numel() for value in found.values())
    shown = {item.name: item.value for item in plan.settings}
    assert shown["rank"] == "4; q_proj 2, layers.1.mlp.up_proj 7"
    assert str(shown["trained"]).startswith(f"{trained // 4:,} weights, ")
    theirs = PeftModel.from_pretrained(model_of("llama"), str(first.folder.adapter))
    scalings = {name: m.scaling["default"] for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {scaling for name, scaling in scalings.items() if "q_proj" in name} == {1.5}
    still = run(config_of(place, f"lora.start_from={first.folder.path}", *STILL), tmp_path / "second")
    assert {name: value.shape for name, value in tensors_of(still.folder.adapter).items()} == {
        name: value.shape for name, value in found.items()
    }


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("lora.rank_pattern={q_porj: 2}", "lora.rank_pattern: 'q_porj' fits none of the adapted layers"),
        ("lora.alpha_pattern={'q_(proj': 2}", "lora.alpha_pattern: 'q_(proj' is no pattern"),
        ("lora.rank_pattern={proj: 2}", "'proj' fits none"),
    ],
)
def test_patterns_that_fit_nothing_are_refused(place: Path, tmp_path: Path, pattern: str, told: str) -> None:
    with pytest.raises(InputError) as refused:
        run(config_of(place, pattern), tmp_path / "run")
    assert told in str(refused.value)
