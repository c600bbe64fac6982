"""Whole runs with DoRA: they learn lengths, go on to the same bits, and nobody who uses them forgets a magnitude."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import adapter_bits, config_of, run, stop_after
from transformers import AutoModelForCausalLM

from fitune.errors import InputError, Interrupted
from fitune.export.merging import merge_adapter
from fitune.models.find import find_model
from fitune.train.run import Outcome
from fitune.train.trained_model import find_trained
from tiny_models import distance

DORA = ("lora.dora=true", "lora.rank=4", "lora.alpha=8")
STILL = ("train.learning_rate=1e-30", "train.steps=1", "train.schedule=constant")
TOKENS = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def first(place: Path) -> Outcome:
    return run(config_of(place, *DORA, "train.compute=float32"), place / "first")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


def test_lengths_are_learnt(place: Path, first: Outcome) -> None:
    still = run(config_of(place, *DORA, "train.compute=float32", *STILL), place / "still")
    begun, ended = tensors_of(still.folder.path), tensors_of(first.folder.path)
    lengths = [name for name in ended if name.endswith("lora_magnitude_vector")]
    assert (len(lengths), len(ended)) == (14, 42)
    assert all(not torch.equal(begun[name], ended[name]) for name in lengths)
    assert first.losses[-1][1] < first.losses[0][1]
    config = json.loads((first.folder.adapter / "adapter_config.json").read_text())
    assert config["use_dora"] is True


@pytest.mark.parametrize(
    "more",
    [
        ["lora.dropout=0.1"],
        ["method=lora", "train.recompute=layers", "train.optimizer=adamw8bit"],
        ["train.optimizer_states=disk", "train.resident_layers=1"],
    ],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(place: Path, tmp_path: Path, more: list[str]) -> None:
    config = config_of(place, *DORA, *more)
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(3))
    run(config, tmp_path / "parts", resume=True)
    assert adapter_bits(tmp_path / "parts") == adapter_bits(tmp_path / "whole")


def test_where_states_and_layers_lie_changes_no_bit(place: Path, tmp_path: Path) -> None:
    run(config_of(place, *DORA), tmp_path / "held")
    run(config_of(place, *DORA, "train.optimizer_states=disk", "train.resident_layers=1"), tmp_path / "away")
    assert adapter_bits(tmp_path / "held") == adapter_bits(tmp_path / "away")


def test_who_asks_a_run_asks_what_was_trained(first: Outcome) -> None:
    found = find_trained(str(first.folder.path)).build()
    expected = logits(first.model.graph)
    assert distance(logits(found.graph), expected) < 1e-5
    assert found.adapted is not None
    with found.adapted.disable_adapter():
        assert distance(logits(found.graph), expected) > 0.01


def test_merged_it_computes_what_peft_computes(place: Path, first: Outcome, tmp_path: Path) -> None:
    report = merge_adapter(find_model(str(place / "model")), first.folder.adapter, tmp_path / "merged")
    assert report.comparison.is_equal
    plain, merged = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
        for one in (place / "model", tmp_path / "merged")
    )
    theirs = PeftModel.from_pretrained(plain, str(first.folder.adapter))
    # bfloat16 weights: rounding them costs a percent; to leave the lengths out, far more
    error = distance(logits(merged), logits(theirs))
    assert error < 0.02
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.1)
    assert distance(logits(merged), logits(theirs)) > 3 * error


def test_a_run_goes_on_from_one_with_lengths(place: Path, first: Outcome, tmp_path: Path) -> None:
    start = f"lora.start_from={first.folder.path}"
    still = run(config_of(place, start, *STILL), tmp_path / "still")
    before, after = tensors_of(first.folder.path), tensors_of(still.folder.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = run(config_of(place, "lora.rank=4", *STILL), tmp_path / "plain")
    with pytest.raises(InputError, match=r"lora.dora is True, but the adapter's is False"):
        run(config_of(place, f"lora.start_from={plain.folder.path}", "lora.dora=true"), tmp_path / "refused")


def test_preferences_compare_with_the_base_without_lengths(place: Path, tmp_path: Path) -> None:
    """Nothing is learnt yet at the first step, and the model is its own reference; it is not any more at the last."""
    pairs = place / "dora_pairs.jsonl"
    lines = [{"prompt": f"After {n}", "chosen": f"{n + 1}!", "rejected": f"{n + 1}?"} for n in range(24)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = (f"data.train={pairs}", "train.objective=dpo", "train.micro_batch=2", *DORA, "train.steps=12")
    made = run(config_of(place, *settings), tmp_path / "run")
    found = [json.loads(line) for line in (made.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert found[0]["reward_margin"] == pytest.approx(0, abs=1e-3)
    assert found[-1]["reward_margin"] > 0.1


def test_a_full_run_has_no_lengths_of_an_adapter(place: Path) -> None:
    with pytest.raises(InputError, match=r"lora.dora.*method full has no adapter"):
        config_of(place, "lora.dora=true", "method=full")
