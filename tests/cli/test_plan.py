"""`fitune plan`: numbers that add up, for a run file and for a bare model."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import call, facts_of

from fitune.cli.plan_page import fits_sentence, print_plan
from fitune.plan.planner import Item, Plan


def test_memory_adds_up_to_the_peak(workplace: Path) -> None:
    facts = facts_of("plan", workplace / "run.yaml")
    assert sum(item["value"] for item in facts["memory"]) == pytest.approx(facts["peak_bytes"], rel=0.02)
    assert facts["fits"] is True
    assert facts["assumed"] is None
    assert facts["seconds_per_step"] > 0


def test_a_bare_model_is_planned_with_a_stated_workload() -> None:
    code, out, err = call("plan", "bundled", "train.micro_batch=1", "data.max_tokens=256", "train.threads=1")
    assert code == 0, err
    assert "Assumed, as no run file was given: 1,000 samples of 256 tokens" in out
    assert "steps          1,000  (derived)" in out


def test_bad_words() -> None:
    code, out, err = call("plan", "bundled", "train.micro_bach=1")
    assert (code, out) == (2, "")
    assert "did you mean micro_batch?" in err
    code, _, err = call("plan", "./no-such-model")
    assert code == 2
    assert "no such file or folder" in err


def test_a_plan_that_does_not_fit_says_what_is_missing(capsys: pytest.CaptureFixture) -> None:
    plan = Plan("m", "lora", 9_000_000_000, 8_000_000_000, 0.0, 0.0, "mm", (Item("all", 9e9, "bytes", "model"),), ())
    assert "does not fit: 1.00 GB are missing" in fits_sentence(plan)
    print_plan(plan)
    assert "does not fit" in capsys.readouterr().out
