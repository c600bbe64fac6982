"""`fitune plan` for other machines: the worked case of docs/plan.md, the page, the table, and bad words."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import call, facts_of

from fitune.cli.output import gigabytes
from fitune.cli.plan_elsewhere_page import nearest_sentence
from fitune.cli.plan_table_page import print_fit_table
from fitune.plan.fit_table import Cell, FitTable
from fitune.plan.nearest_fit import NearestFit

WORKED = (
    "codellama-13b", "--memory", "24GB", "--count", "3", "lora.rank=64", "lora.alpha=32", "train.micro_batch=1",
    "train.accumulation=16", "train.compute=bfloat16",
)  # fmt: skip


def test_the_worked_case() -> None:
    """CodeLlama-13B, LoRA rank 64, three cards of 24 GB: plain LoRA does not fit, sharded LoRA and QLoRA do.

    docs/plan.md says the same in numbers.
    """
    page = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    facts = facts_of("plan", *WORKED, "method=lora")
    memory = {item["name"]: item["value"] for item in facts["memory"]}
    assert memory["frozen weights"] == pytest.approx(2 * 13_016_028_160, rel=1e-4)
    assert sum(memory.values()) == facts["peak_bytes"]
    assert not facts["fits"]
    assert facts["peak_bytes"] - facts["available_bytes"] == pytest.approx(12.8e9, rel=0.05)
    assert f"does not fit: {gigabytes(facts['peak_bytes'] - facts['available_bytes'])} are missing on each" in page
    sharding = facts["sharding"]
    assert f"Sharded over the 3 (FSDP, ZeRO-3): {gigabytes(sharding['peak_bytes'])} on each; it fits" in page
    assert f"received in a step                      {gigabytes(sharding['bytes_per_step'])}" in page
    assert sharding["fits"]
    assert sharding["gather_bytes_per_micro_batch"] == pytest.approx(2 * 2 / 3 * 27.03e9, rel=0.01)
    assert sharding["bytes_per_step"] > 16 * sharding["gather_bytes_per_micro_batch"]
    assert facts["nearest"]["settings"] == ["method=qlora"]
    assert facts["nearest"]["missing_bytes"] == 0
    assert f"The nearest that fits: method=qlora, which takes {gigabytes(facts['nearest']['peak_bytes'])}." in page
    four = facts_of("plan", *WORKED, "method=qlora")
    assert four["fits"]
    assert four["peak_bytes"] == facts["nearest"]["peak_bytes"]
    assert four["nearest"] is None
    assert four["seconds_per_step"] is None


def test_the_page_says_what_is_missing() -> None:
    least = ("train.micro_batch=1", "train.recompute=layers", "train.optimizer=adamw8bit", "data.max_tokens=256")
    code, out, err = call("plan", "smollm2-135m", "--memory", "400MB", "--count", "2", *least)
    assert code == 0, err
    assert out.startswith("Plan: qlora on smollm2-135m, for 2 x GPU of 400MB\n")
    for words in (
        "memory on each", "available", "It does not fit: ", "missing on each, which holds everything",
        "Sharded over the 2 (FSDP, ZeRO-3): ", "received to gather weights, twice",
        "Nothing that can be set makes it smaller.",
        "Sharded: Nothing that can be set makes it smaller.", "its time is not known", "devices",
    ):  # fmt: skip
        assert words in out, words
    assert "(probe)" not in out


def test_what_would_fit_is_written_as_it_is_typed() -> None:
    fits = NearestFit(("train.recompute=layers", "method=qlora"), 5 * 10**9, 0)
    assert (
        nearest_sentence(fits) == "The nearest that fits: train.recompute=layers method=qlora, which takes 5.00 GB."
    )
    assert "with method=qlora 2.00 GB are missing" in nearest_sentence(NearestFit(("method=qlora",), 5, 2 * 10**9))


@pytest.mark.parametrize(
    ("machine", "method", "others"),
    [("24GB", "lora", set()), ("900MB", "qlora", {"train.recompute"})],
)
def test_settings_are_chosen_for_another_machine(machine: str, method: str, others: set[str]) -> None:
    """What is chosen fits there with the margin; what costs time is chosen only where memory asks for it."""
    facts = facts_of("plan", "bundled", "--memory", machine, "method=auto", "data.max_tokens=512")
    assert facts["method"] == method
    chosen = {choice["setting"]: choice["value"] for choice in facts["choices"]}
    assert chosen.keys() == {"method"} | others
    assert 1.05 * facts["peak_bytes"] <= facts["budget_bytes"] == facts["available_bytes"]
    settings = {item["name"]: item for item in facts["settings"]}
    assert settings["recompute"]["origin"] == ("budget" if others else "default")
    named = [f"{name}={value}" for name, value in chosen.items()]
    again = facts_of("plan", "bundled", "--memory", machine, *named, "data.max_tokens=512")
    assert again["peak_bytes"] == facts["peak_bytes"]


def test_a_budget_on_another_machine(workplace: Path) -> None:
    whole = facts_of("plan", workplace / "run.yaml", "--on", "cpu:64GB", "memory=auto")
    assert whole["budget_bytes"] == 64 * 10**9
    assert not whole["choices"]
    budget = round(1.02 * whole["peak_bytes"] / 1e6)  # without the margin
    small = facts_of("plan", workplace / "run.yaml", "--on", "cpu:64GB", f"memory={budget}MB")
    assert small["budget_bytes"] == budget * 10**6 >= 1.05 * small["peak_bytes"]
    assert small["choices"]


def test_a_run_file_is_planned_for_another_machine(workplace: Path) -> None:
    facts = facts_of("plan", workplace / "run.yaml", "--on", "rtx3060")
    assert facts["fits"]
    assert facts["assumed"] is None
    assert facts["machine"]["memory_bytes"] == 12288 * 2**20
    assert {item["name"]: item["value"] for item in facts["settings"]}["steps"] > 0
    there = facts_of("plan", workplace / "run.yaml", "--on", "cpu:64GB")
    assert there["available_bytes"] == 64 * 10**9
    assert there["seconds_per_step"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory", "24"), "has no unit; write 24GB"),
        (("--memory", "much"), "is not an amount of memory"),
        (("--on", "rtx4091"), "did you mean rtx4090"),
        (("--on", "rtx4090", "--memory", "24GB"), "keep one"),
        (("--on", "rtx4090", "--count", "0"), "0 devices"),
        (("--count", "2"), "add --on CARD or --memory SIZE"),
        (("--table", "--on", "rtx4090"), "is over many machines"),
        (("--table", "method=lora", "lora.rank=8"), "chooses method itself"),
        (("--on", "rtx3060", "method=auto", "memory=64GB"), "memory: 64GB is more than the 12.88 GB of rtx3060"),
        (("--memory", "400MB", "method=auto"), "memory: 0.40 GB are too few: the least that this run takes is "),
        (("--table", "memory=8GB"), "chooses memory itself"),
        (("--on", "rtx4090", "train.compute=int8"), "int8 is for processors with VNNI"),
    ],
)
def test_bad_words(words: tuple[str, ...], message: str) -> None:
    code, out, err = call("plan", "bundled", *words)
    assert (code, out) == (2, "")
    assert message in err


def test_the_table_on_the_screen(capsys: pytest.CaptureFixture) -> None:
    cells = (
        Cell("qlora", "adamw", "gpu", 8 * 10**9, 2048, 0), Cell("full", "adamw8bit", "gpu", 8 * 10**9, 0, 3 * 10**9),
        Cell("qlora", "adamw", "cpu", 16 * 10**9, 512, 0), Cell("full", "adamw8bit", "cpu", 16 * 10**9, 256, 0),
    )  # fmt: skip
    print_fit_table(FitTable("m", (256, 4096), (256, 4096), "layers", 16, cells))
    out = capsys.readouterr().out
    assert "GPU                8 GB\nqlora              2,048\nfull, 8-bit AdamW  -3.00 GB\n" in out
    assert "CPU                16 GB\nqlora              512\n" in out
    assert "Dry-run at 256, 4,096 tokens" in out


@pytest.mark.slow
def test_the_table_of_a_preset() -> None:
    facts = facts_of("plan", "smollm2-135m", "--table", "lora.rank=8")
    assert facts["rank"] == 8
    longest = {
        (cell["method"], cell["optimizer"], cell["kind"], cell["memory_bytes"]): cell["longest_tokens"]
        for cell in facts["cells"]
    }
    assert longest["qlora", "adamw", "gpu", 8 * 10**9] == 8192
    assert all(tokens % 256 == 0 for tokens in longest.values())
