"""Whole runs with modules trained beside the adapter: to the same bits, merged, gone on from, asked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_runs import adapter_bits, config_of, run, stop_after
from transformers import AutoModelForCausalLM

from fitune.errors import InputError, Interrupted
from fitune.export.merging import merge_adapter
from fitune.models.find import find_model
from fitune.train.run import Outcome, plan_run, prepare_run
from fitune.train.trained_model import find_trained
from tiny_models import distance, write_model, write_questions

WHOLE = ("lora.modules_to_save=[embed_tokens,lm_head,norm]", "lora.rank=4", "lora.alpha=8")
STILL = ("train.learning_rate=1e-30", "train.steps=1", "train.schedule=constant")
TOKENS = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Iterator[Path]:
    """Another place, whose model has one weight for embeddings and head."""
    folder = tmp_path_factory.mktemp("tied")
    write_model(folder / "model", "qwen2")
    write_questions(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def first(place: Path) -> Outcome:
    return run(config_of(place, *WHOLE), place / "first")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


def test_they_are_learnt_and_planned(place: Path, first: Outcome) -> None:
    trained = sum(parameter.numel() for parameter in first.model.trainable)
    said = next(item for item in first.plan.settings if item.name == "trained")
    assert str(said.value).startswith(f"{trained:,} weights")
    assert trained > 2 * 320 * 64
    plain = plan_run(prepare_run(config_of(place, "lora.rank=4")), with_time=False)
    sizes, without = ({item.name: item.value for item in plan.memory} for plan in (first.plan, plain))
    extra = 4 * (2 * 320 * 64 + 64)
    assert sizes["trained weights"] - without["trained weights"] == extra
    assert sizes["optimizer states"] - without["optimizer states"] == pytest.approx(2 * extra, rel=0.01)
    still = run(config_of(place, *WHOLE, *STILL), place / "still")
    begun, ended = tensors_of(still.folder.path), tensors_of(first.folder.path)
    assert begun.keys() == ended.keys()
    for name in (EMBEDDING, HEAD, "base_model.model.model.norm.weight"):
        assert not torch.equal(begun[name], ended[name])
    assert first.losses[-1][1] < first.losses[0][1]


@pytest.mark.parametrize(
    "more",
    [
        ["method=qlora"],
        ["method=lora", "train.recompute=layers", "train.optimizer=adamw8bit", "train.neftune_alpha=5"],
        ["method=qlora", "train.optimizer_states=disk", "train.resident_layers=1"],
        ["method=lora", "lora.dora=true", "lora.modules_to_save=[input_layernorm,v_proj]"],
        ["method=qlora", "train.compute=int8"],
    ],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(place: Path, tmp_path: Path, more: list[str]) -> None:
    given = "lora.modules_to_save" in "".join(more)
    config = config_of(place, *(WHOLE[1:] if given else WHOLE), *more)
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(3))
    run(config, tmp_path / "parts", resume=True)
    assert adapter_bits(tmp_path / "parts") == adapter_bits(tmp_path / "whole")


def test_where_states_and_layers_lie_changes_no_bit(place: Path, tmp_path: Path, first: Outcome) -> None:
    run(config_of(place, *WHOLE, "train.optimizer_states=disk", "train.resident_layers=1"), tmp_path / "away")
    assert adapter_bits(first.folder.path) == adapter_bits(tmp_path / "away")


def test_who_asks_a_run_asks_what_was_trained(first: Outcome) -> None:
    found = find_trained(str(first.folder.path)).build()
    expected = logits(first.model.graph)
    assert distance(logits(found.graph), expected) < 1e-2  # of float32 copies, those rounded to bfloat16
    assert found.adapted is not None
    with found.adapted.disable_adapter():
        assert distance(logits(found.graph), expected) > 0.1


@pytest.mark.parametrize("kind", ["apart", "tied"])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_merged_it_computes_what_peft_computes(
    place: Path, tied: Path, tmp_path: Path, kind: str, method: str
) -> None:
    where = place if kind == "apart" else tied
    made = run(config_of(where, *WHOLE, f"method={method}"), tmp_path / "run")
    report = merge_adapter(find_model(str(where / "model")), made.folder.adapter, tmp_path / "merged")
    assert report.comparison.is_equal
    plain, merged = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
        for one in (where / "model", tmp_path / "merged")
    )
    base = logits(plain)
    theirs = PeftModel.from_pretrained(plain, str(made.folder.adapter))
    assert distance(logits(merged), logits(theirs)) < 0.02
    assert distance(base, logits(theirs)) > 0.1
    written, trained = load_file(tmp_path / "merged" / "model.safetensors"), tensors_of(made.folder.path)
    assert torch.equal(written["model.embed_tokens.weight"], trained[EMBEDDING].bfloat16())
    assert ("lm_head.weight" in written) == (kind == "apart")
    assert torch.equal(merged.lm_head.weight, trained[HEAD].bfloat16().float())
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (kind == "tied")


def test_tied_ends_are_trained_as_one_whichever_is_named(tied: Path, tmp_path: Path) -> None:
    found = [
        run(config_of(tied, f"lora.modules_to_save=[{name}]", "train.steps=2"), tmp_path / name)
        for name in ("embed_tokens", "lm_head")
    ]
    bits = [tensors_of(made.folder.path) for made in found]
    assert torch.equal(bits[0][EMBEDDING], bits[0][HEAD])
    assert all(torch.equal(bits[0][name], bits[1][name]) for name in bits[0])
    config = json.loads((found[0].folder.adapter / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True
    assert sorted(config["modules_to_save"]) == ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize("kind", ["apart", "tied"])
def test_a_run_goes_on_from_one(place: Path, tied: Path, tmp_path: Path, kind: str) -> None:
    where = place if kind == "apart" else tied
    before = run(config_of(where, *WHOLE), tmp_path / "before")
    start = f"lora.start_from={before.folder.path}"
    still = run(config_of(where, start, *STILL), tmp_path / "still")
    old, new = tensors_of(before.folder.path), tensors_of(still.folder.path)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    config = config_of(where, start)
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(3))
    run(config, tmp_path / "parts", resume=True)
    assert adapter_bits(tmp_path / "parts") == adapter_bits(tmp_path / "whole")
    with pytest.raises(InputError, match=r"lora\.modules_to_save is"):
        run(config_of(where, start, "lora.modules_to_save=[norm]"), tmp_path / "refused")


def made_by_peft(where: Path, folder: Path, is_tied: bool) -> Path:
    model = AutoModelForCausalLM.from_pretrained(where / "model")
    settings = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": is_tied}
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, **settings))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(adapted.named_parameters()):
            if "modules_to_save" in name:
                parameter.mul_(1.25 + number / 512)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "is_tied"), [("apart", False), ("tied", True)])
def test_one_that_peft_made_is_gone_on_with_and_merged(
    place: Path, tied: Path, tmp_path: Path, kind: str, is_tied: bool
) -> None:
    where = place if kind == "apart" else tied
    folder = made_by_peft(where, tmp_path / "theirs", is_tied)
    still = run(config_of(where, f"lora.start_from={folder}", *STILL), tmp_path / "still")
    old, new = load_file(folder / "adapter_model.safetensors"), tensors_of(still.folder.path)
    assert old.keys() == new.keys()
    # The table's row of zeros, for padding, is a row of the head too, and learns what little there is to learn.
    assert all(torch.allclose(old[name].float(), new[name], rtol=0, atol=1e-20) for name in old)
    assert merge_adapter(find_model(str(where / "model")), folder, tmp_path / "merged").comparison.is_equal


def test_two_where_the_model_has_one_are_refused(tied: Path, tmp_path: Path) -> None:
    folder = made_by_peft(tied, tmp_path / "theirs", is_tied=False)
    with pytest.raises(InputError, match="are one weight in the model, and two with this adapter"):
        merge_adapter(find_model(str(tied / "model")), folder, tmp_path / "merged")
    with pytest.raises(InputError, match="whole, apart from what it is tied to in the model"):
        run(config_of(tied, f"lora.start_from={folder}"), tmp_path / "run")


def test_preferences_compare_with_the_originals(place: Path, tmp_path: Path) -> None:
    """Nothing is learnt yet at the first step, and the model is its own reference; it is not any more at the last."""
    pairs = place / "whole_pairs.jsonl"
    lines = [{"prompt": f"After {n}", "chosen": f"{n + 1}!", "rejected": f"{n + 1}?"} for n in range(24)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = (f"data.train={pairs}", "train.objective=dpo", "train.micro_batch=2", *WHOLE, "train.steps=12")
    made = run(config_of(place, *settings), tmp_path / "run")
    found = [json.loads(line) for line in (made.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert found[0]["reward_margin"] == pytest.approx(0, abs=1e-3)
    assert found[-1]["reward_margin"] > 0.1


def test_what_is_in_four_bits_is_refused_before_anything_is_made(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="q_proj is in 4 bits, and cannot be trained whole: take method lora"):
        plan_run(prepare_run(config_of(place, "lora.modules_to_save=[q_proj]", "lora.targets=[k_proj]")))
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match=r"lora.modules_to_save.*method full has no adapter"):
        config_of(place, "lora.modules_to_save=[lm_head]", "method=full")
    with pytest.raises(InputError, match=r"lora.modules_to_save.*say method lora or qlora"):
        config_of(place, "lora.modules_to_save=[lm_head]", "method=auto")
