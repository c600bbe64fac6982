"""Whole runs that begin with LoftQ: gone on with to the same bits, used beside 4 bits only, merged without counting
twice what the 4 bits lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import adapter_bits, config_of, run, stop_after
from transformers import AutoModelForCausalLM

from fitune.errors import FituneError, InputError, Interrupted
from fitune.export import trained_beside
from fitune.export.merging import merge_adapter
from fitune.models.find import find_model
from fitune.models.store import open_store
from fitune.train.run import Outcome, prepare_run
from fitune.train.trained_model import find_trained
from tiny_models import BACKEND, distance

LOFTQ = ("lora.initial=loftq", "lora.rank=8", "lora.alpha=16")
STILL = ("train.learning_rate=1e-30", "train.steps=1", "train.schedule=constant", "train.compute=float32")
TOKENS = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


@pytest.fixture(scope="module")
def first(place: Path) -> Outcome:
    return run(config_of(place, *LOFTQ, "train.compute=float32"), place / "first")


@pytest.mark.parametrize("more", [[], ["lora.dora=true", "train.resident_layers=0"]])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(place: Path, tmp_path: Path, more: list[str]) -> None:
    config = config_of(place, *LOFTQ, *more)
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(3))
    run(config, tmp_path / "parts", resume=True)
    assert adapter_bits(tmp_path / "parts") == adapter_bits(tmp_path / "whole")


def test_it_begins_nearer_to_the_16_bit_model(place: Path, tmp_path: Path) -> None:
    dense = logits(AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32))
    distances = [
        distance(logits(run(config_of(place, *STILL, *more), tmp_path / name).model.graph), dense)
        for name, more in (("zero", []), ("loftq", ["lora.initial=loftq", "lora.rank=32"]))
    ]
    assert distances[1] < 0.5 * distances[0]


def test_it_is_used_beside_4_bits_only(first: Outcome) -> None:
    expected = logits(first.model.graph)
    base = json.loads((first.folder.adapter / "base.json").read_text())
    assert base["weights"] == "nf4"
    for words in (first.folder.path, first.folder.adapter):
        found = find_trained(str(words))
        assert found.method == "qlora"
        graph = found.build().graph
        assert distance(logits(graph), expected) < (1e-5 if graph.dtype == torch.float32 else 0.05)
        with pytest.raises(InputError, match="makes up for the 4 bits of its base"):
            find_trained(str(words), four_bit=False).build()


@pytest.mark.parametrize("dora", [False, True])
def test_merged_it_computes_what_was_trained(
    place: Path, first: Outcome, tmp_path: Path, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of the 4 bits with the adapter in them, rounded once to bfloat16."""
    if dora:
        first = run(config_of(place, *LOFTQ, "lora.dora=true", "train.compute=float32"), tmp_path / "dora")
    source = find_model(str(place / "model"))
    report = merge_adapter(source, first.folder.adapter, tmp_path / "merged")
    assert report.comparison.is_equal
    found, adapter = load_file(tmp_path / "merged" / "model.safetensors"), load_file(
        first.folder.adapter / "adapter_model.safetensors"
    )  # fmt: skip
    store = open_store(source, BACKEND)
    for name in store.quantised:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        weight = store.weight(name).dense(torch.float32, BACKEND)
        weight += 2 * adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"]
        if dora:
            weight *= (adapter[f"{key}magnitude_vector"] / weight.norm(dim=1)).unsqueeze(1)
        torch.testing.assert_close(found[name].float(), weight, rtol=2**-7, atol=1e-6)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    trained = logits(first.model.graph)
    error = distance(logits(merged), trained)
    assert error < 0.02
    # Beside the base's own weights what was lost is added a second time.
    with monkeypatch.context() as patch:
        patch.setattr(trained_beside, "belongs_to_four_bits", lambda folder: False)
        merge_adapter(source, first.folder.adapter, tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", dtype=torch.float32)
    assert distance(logits(twice), trained) > 3 * error


def test_a_merge_into_other_weights_is_caught(
    place: Path, first: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison has its own idea of the base: a merge that forgets the 4 bits does not pass it."""
    monkeypatch.setattr("fitune.export.merging.TrainedBase", _Own)
    with pytest.raises(FituneError, match="does not compute what base"):
        merge_adapter(find_model(str(place / "model")), first.folder.adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


class _Own(trained_beside.TrainedBase):
    def weight(self, name: str, own: torch.Tensor) -> torch.Tensor:
        return own


def test_a_run_goes_on_from_it_in_4_bits(place: Path, first: Outcome, tmp_path: Path) -> None:
    start = f"lora.start_from={first.folder.path}"
    still = run(config_of(place, start, *STILL), tmp_path / "still")
    assert json.loads((still.folder.adapter / "base.json").read_text())["weights"] == "nf4"
    assert adapter_bits(still.folder.path) == adapter_bits(first.folder.path)
    with pytest.raises(InputError, match="go on from it with method qlora"):
        prepare_run(config_of(place, start, "method=lora"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["method=lora"], "take method qlora"),
        (["method=auto"], "take method qlora"),
        (["method=full"], "method full has no adapter"),
        (["train.objective=dpo"], "dpo compares with the base without its adapter"),
        (["lora.start_from=."], "is not begun anew"),
    ],
)
def test_what_cannot_stand_beside_it(place: Path, more: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        config_of(place, *LOFTQ, *more)


def test_a_model_in_these_4_bits_is_refused_before_anything(place: Path) -> None:
    store = open_store(find_model(str(place / "model")), BACKEND)
    with pytest.raises(InputError, match="in these 4 bits already"):
        prepare_run(config_of(place, *LOFTQ, f"model={store.folder}"))
