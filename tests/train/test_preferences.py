"""Runs on preference pairs: they learn what is better, go on to the same bits, and say how they stand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny_runs import adapter_bits, config_of, run, stop_after

from fitune.config.schema import RunConfig
from fitune.errors import InputError, Interrupted


@pytest.fixture(scope="module")
def pairs(place: Path) -> Path:
    """Of two answers the one with an exclamation mark is better."""
    path = place / "pairs.jsonl"
    lines = [
        {"prompt": f"After {n}", "chosen": f"{n + 1}" + "!" * (1 + n % 3), "rejected": f"{n + 1}" + "?" * (1 + n % 4)}
        for n in range(48)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def judged(place: Path, pairs: Path) -> Path:
    """The same answers one by one."""
    path = place / "judged.jsonl"
    lines = []
    for line in map(json.loads, pairs.read_text().splitlines()):
        lines += [
            {"prompt": line["prompt"], "completion": line[key], "label": key == "chosen"}
            for key in ("chosen", "rejected")
        ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def preferring(place: Path, pairs: Path, objective: str, *more: str) -> RunConfig:
    return config_of(place, f"data.train={pairs}", f"train.objective={objective}", "data.validation=0.25", *more)


def entries(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("objective", "more"),
    [("dpo", []), ("orpo", []), ("orpo", ["method=full", "train.learning_rate=0.001"]), ("dpo", ["data.pack=false"])],
)
def test_what_is_better_is_learnt(place: Path, pairs: Path, tmp_path: Path, objective: str, more: list[str]) -> None:
    settings = ["train.steps=24", "train.micro_batch=2", *more]
    run(preferring(place, pairs, objective, *settings), tmp_path / "run")
    found = entries(tmp_path / "run")
    first, last = found[0], found[-2]
    assert last["reward_margin"] > first["reward_margin"] + 0.2
    assert last["loss"] < first["loss"]
    assert found[-1]["validation_reward_accuracy"] > 0.9
    if objective == "dpo":  # nothing is learnt yet: the model is its own reference
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert first["reward_margin"] == pytest.approx(0, abs=1e-3)


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(place: Path, pairs: Path, tmp_path: Path) -> None:
    config = preferring(place, pairs, "dpo", "lora.dropout=0.1")
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "stopped", watch=stop_after(3))
    run(config, tmp_path / "stopped", resume=True)
    assert adapter_bits(tmp_path / "stopped") == adapter_bits(tmp_path / "whole")


def test_judged_answers_are_learnt_and_gone_on_with(place: Path, judged: Path, tmp_path: Path) -> None:
    config = preferring(place, judged, "kto", "train.steps=24", "train.micro_batch=2")
    run(config, tmp_path / "whole")
    found = entries(tmp_path / "whole")
    assert found[-2]["reward_margin"] > found[0]["reward_margin"] + 0.1
    assert found[0]["loss"] == pytest.approx(0.5, abs=1e-3)
    assert found[-2]["loss"] < 0.45
    assert found[-1]["validation_reward_accuracy"] > 0.7
    with pytest.raises(Interrupted):
        run(config, tmp_path / "stopped", watch=stop_after(9))
    run(config, tmp_path / "stopped", resume=True)
    assert adapter_bits(tmp_path / "stopped") == adapter_bits(tmp_path / "whole")


def test_another_objective_is_another_run(place: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(preferring(place, pairs, "dpo"), tmp_path / "run", watch=stop_after(3))
    with pytest.raises(InputError, match=r"train\.beta"):
        run(preferring(place, pairs, "dpo", "train.beta=0.2"), tmp_path / "run", resume=True)


def test_rates_follow_the_objective(place: Path, pairs: Path) -> None:
    from fitune.train.loop import learning_rate

    rates = {
        objective: learning_rate(preferring(place, pairs, objective, "train.learning_rate=null"))
        for objective in ("dpo", "orpo", "kto")
    }
    assert rates == {"dpo": 5e-6, "orpo": 8e-5, "kto": 5e-6}
