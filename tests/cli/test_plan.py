"""`fitune plan`: numbers that add up, for a run file and for a bare model."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
from command_line import call, facts_of

from fitune.cli.plan_page import fits_sentence, print_plan
from fitune.plan.planner import Item, Plan
from tiny_models import tokenizer, write_model, write_questions


def test_memory_adds_up_to_the_peak(workplace: Path) -> None:
    facts = facts_of("plan", workplace / "run.yaml")
    assert sum(item["value"] for item in facts["memory"]) == pytest.approx(facts["peak_bytes"], rel=0.02)
    assert facts["fits"] is True
    assert facts["assumed"] is None
    assert facts["seconds_per_step"] > 0


def test_what_is_odd_about_a_model_is_said_first(tmp_path: Path) -> None:
    """By plan and by train, beside --json too; a tokenizer of another model ends both before any work."""
    folder = write_model(tmp_path / "model", vocab_size=259)
    odd = tokenizer()
    odd.add_tokens(["<picture>"])
    odd.save_pretrained(folder)
    write_questions(tmp_path / "questions.jsonl", 8)
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {folder}\noutput: {tmp_path / 'run'}\ndata:\n  train: questions.jsonl\n  max_tokens: 256\n"
        "train:\n  steps: 1\n  micro_batch: 1\n  accumulation: 1\n  threads: 1\n"
    )
    bare = (folder, "train.micro_batch=1", "data.max_tokens=64", "train.threads=1")
    for arguments in (("plan", run), ("plan", *bare), ("train", run)):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        (warning,) = json.loads(out)["warnings"]
        assert "'<picture>' (id 259) without a row" in warning
        assert err.startswith(f"warning: {warning}\n")
    odd.eos_token = "<picture>"
    odd.save_pretrained(folder)
    for arguments in (("plan", run), ("plan", *bare), ("train", run, f"output={tmp_path / 'again'}")):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert "were added to the tokenizer, not to the model" in err
    assert not (tmp_path / "again").exists()


def test_a_bare_model_is_planned_with_a_stated_workload() -> None:
    code, out, err = call("plan", "bundled", "train.micro_batch=1", "data.max_tokens=256", "train.threads=1")
    assert code == 0, err
    assert "Assumed, as no run file was given: 1,000 samples of 256 tokens" in out
    assert "steps          1,000  (derived)" in out


def test_a_preset_is_planned_without_a_length() -> None:
    settings = ("train.micro_batch=1", "data.max_tokens=128", "train.threads=1")
    code, out, err = call("plan", "SmolLM2-135M", *settings)
    assert code == 0, err
    assert re.search(r"time +[\d.]+ s a step  \(probe\)", out)
    assert "in all" not in out
    assert "steps  " not in out
    assert "follows from your data, or from train.steps=N" in out
    facts = facts_of("plan", "smollm2-135m", *settings, "train.steps=10")
    assert facts["seconds"] == pytest.approx(10 * facts["seconds_per_step"])
    assert "1,000 samples" not in facts["assumed"]


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama-2-13b", "qlora"), ("codellama-13b", "lora"), ("gemma-7b", "qlora"), ("llama-3-70b", "qlora")],
)
def test_a_preset_larger_than_the_machine(name: str, method: str) -> None:
    """Its weights are counted to the byte, but never allocated."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    long = ("train.micro_batch=16", "data.max_tokens=4096", "train.threads=1")
    facts = facts_of("plan", name, f"method={method}", *long)
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    memory = {item["name"]: item["value"] for item in facts["memory"]}
    expected = facts_of("models", "show", name)["bytes_nf4" if method == "qlora" else "bytes_16bit"]
    assert memory["frozen weights"] == pytest.approx(expected, rel=0.001)
    assert facts["peak_bytes"] > expected
    assert (facts["fits"], facts["seconds_per_step"]) == (False, None)
    assert grown_bytes < 1e9


def test_bad_words() -> None:
    code, out, err = call("plan", "bundled", "train.micro_bach=1")
    assert (code, out) == (2, "")
    assert "did you mean micro_batch?" in err
    code, _, err = call("plan", "./no-such-model")
    assert code == 2
    assert "no such file or folder" in err
    code, _, err = call("plan", "lama-3-70b")
    assert code == 2
    assert "llama-3-70b" in err


def test_a_plan_that_does_not_fit_says_what_is_missing(capsys: pytest.CaptureFixture) -> None:
    plan = Plan("m", "lora", 9_000_000_000, 8_000_000_000, 0.0, 0.0, "mm", (Item("all", 9e9, "bytes", "model"),), ())
    assert "does not fit: 1.00 GB are missing" in fits_sentence(plan)
    print_plan(plan)
    assert "does not fit" in capsys.readouterr().out
