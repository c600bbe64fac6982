"""Levers in their order, only those that are needed, and what is missing where none is enough."""

from __future__ import annotations

from dataclasses import replace

from fitune.config.schema import RunConfig
from fitune.plan.elsewhere import peak_on
from fitune.plan.machines import Machine, find_machine
from fitune.plan.nearest_fit import nearest_fit
from fitune.plan.planner import Workload
from tiny_models import config_of

CARD = find_machine("rtx3090", None, 1)
WORK = Workload(0, 0, 64, 0.5, 2048)
CONFIG = config_of("llama", num_hidden_layers=6)


def run_of(method: str, **train: object) -> RunConfig:
    return RunConfig.model_validate({"model": "tiny", "method": method, "data": {"train": "a"}, "train": train})


def peak_of(run: RunConfig, workload: Workload = WORK) -> int:
    return peak_on(CARD, run, CONFIG, workload)


def of_size(memory_bytes: int) -> Machine:
    return replace(CARD, memory_bytes=memory_bytes)


def test_recomputing_comes_first_and_alone_where_it_is_enough() -> None:
    room = peak_of(run_of("lora", recompute="layers"))
    found = nearest_fit(run_of("lora"), CONFIG, of_size(room), WORK)
    assert found.settings == ("train.recompute=layers",)
    assert (found.peak_bytes, found.missing_bytes) == (room, 0)


def test_rows_a_step_stay_when_they_come_one_at_a_time() -> None:
    room = peak_of(run_of("lora", recompute="layers", micro_batch=1, accumulation=8))
    found = nearest_fit(run_of("lora", micro_batch=4, accumulation=2), CONFIG, of_size(room), WORK)
    assert found.settings == ("train.recompute=layers", "train.micro_batch=1", "train.accumulation=8")
    assert found.missing_bytes == 0


def test_what_is_not_needed_in_the_end_is_taken_back() -> None:
    """Room for a quantised base: kept activations fit beside it too."""
    run = run_of("full", micro_batch=1)
    room = peak_of(run_of("qlora", micro_batch=1))
    assert peak_of(run_of("lora", micro_batch=1, recompute="layers")) < peak_of(run)
    found = nearest_fit(run, CONFIG, of_size(room), WORK)
    assert found.missing_bytes == 0
    assert found.peak_bytes <= room
    assert len(found.settings) <= 2


def test_shorter_rows_come_last() -> None:
    least = run_of("qlora", micro_batch=1, recompute="layers", optimizer="adamw8bit")
    room = peak_of(least, replace(WORK, row_tokens=512))
    assert room < peak_of(least)
    found = nearest_fit(run_of("qlora", micro_batch=1), CONFIG, of_size(room), WORK)
    assert found.missing_bytes == 0
    assert found.settings[-1] in ("data.max_tokens=512", "data.max_tokens=256")


def test_what_cannot_fit_is_said_with_what_is_missing() -> None:
    found = nearest_fit(run_of("lora"), CONFIG, of_size(1000), WORK)
    assert found.missing_bytes == found.peak_bytes - 1000 > 0
    assert "data.max_tokens=256" in found.settings
    assert "method=qlora" in found.settings


def test_a_run_that_fits_is_left_alone() -> None:
    found = nearest_fit(run_of("qlora"), CONFIG, CARD, WORK)
    assert (found.settings, found.missing_bytes) == ((), 0)
