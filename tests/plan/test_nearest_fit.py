"""Levers in their order, only those that are needed, and what is missing where none is enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.plan.elsewhere import peak_on
from fitune.plan.machines import find_machine
from fitune.plan.nearest_fit import nearest_fit, search
from fitune.plan.planner import Workload
from tiny_models import config_of

WORK = Workload(0, 0, 64, 0.5, 2048)
WEIGHTS = {"full": 32, "lora": 16, "qlora": 4}


def run_of(method: str, **train: object) -> RunConfig:
    return RunConfig.model_validate({"model": "tiny", "method": method, "data": {"train": "a"}, "train": train})


def sum_of(run: RunConfig, workload: Workload) -> int:
    """Thousands of bytes as a table of a textbook has them: weights, states, activations."""
    states = {"adamw": 64, "adamw8bit": 16}[run.train.optimizer] if run.method == "full" else 1
    activations = run.train.micro_batch * workload.row_tokens // 256
    return 1000 * (WEIGHTS[run.method] + states) + 100 * activations * (1 if run.train.recompute == "layers" else 10)


def found(run: RunConfig, memory_bytes: int, peak: Callable[[RunConfig, Workload], int] = sum_of) -> tuple[str, ...]:
    nearest = search(run, WORK, memory_bytes, peak)
    assert nearest.missing_bytes == max(0, nearest.peak_bytes - memory_bytes)
    return nearest.settings


def test_recomputing_comes_first_and_alone_where_it_is_enough() -> None:
    run = run_of("lora")
    assert sum_of(run, WORK) == 49_000
    assert found(run, 49_000) == ()
    assert found(run, 48_999) == ("train.recompute=layers",)
    assert found(run, 20_200) == ("train.recompute=layers",)


def test_rows_a_step_stay_when_they_come_one_at_a_time() -> None:
    run = run_of("lora", micro_batch=4, accumulation=2)
    assert found(run, 18_000) == ("train.recompute=layers", "train.micro_batch=1", "train.accumulation=8")


def test_states_in_8_bits_are_for_full_fine_tuning_before_another_method() -> None:
    run = run_of("full", micro_batch=1)
    assert found(run, 60_000) == ("train.optimizer=adamw8bit",)
    assert found(run, 48_900) == ("train.recompute=layers", "train.optimizer=adamw8bit")
    assert found(run, 40_000) == ("method=lora",)


def test_what_is_not_needed_in_the_end_is_taken_back() -> None:
    assert found(run_of("lora"), 40_000, lambda r, w: sum_of(r, w) + 30_000 * (r.method == "lora")) == (
        "method=qlora",
    )
    assert found(run_of("full"), 6_000) == (
        "train.recompute=layers", "train.micro_batch=1", "train.accumulation=4", "method=qlora",
    )  # fmt: skip


def test_shorter_rows_come_last() -> None:
    settings = found(run_of("qlora", micro_batch=1), 5_300)
    assert settings == ("train.recompute=layers", "data.max_tokens=512")


def test_what_cannot_fit_is_said_with_what_is_missing() -> None:
    nearest = search(run_of("lora"), WORK, 1000, sum_of)
    assert nearest.settings[-2:] == ("method=qlora", "data.max_tokens=256")
    assert (nearest.peak_bytes, nearest.missing_bytes) == (5_100, 4_100)


def test_a_lever_that_a_model_has_not_is_left() -> None:
    def without_recomputation(run: RunConfig, workload: Workload) -> int:
        if run.train.recompute == "layers":
            raise InputError("cannot compute its layers again", where="train.recompute")
        return sum_of(run, workload)

    assert "train.recompute=layers" not in found(run_of("lora"), 20_000, without_recomputation)


def test_each_run_is_looked_at_once() -> None:
    seen: list[tuple[str, Workload]] = []

    def noted(run: RunConfig, workload: Workload) -> int:
        seen.append((run.method + run.train.model_dump_json(), workload))
        return sum_of(run, workload)

    search(run_of("full"), WORK, 5_500, noted)
    assert len(seen) == len(set(seen))


def test_with_real_dry_runs() -> None:
    card, config = find_machine("rtx3090", None, 1), config_of("llama", num_hidden_layers=2)
    room = peak_on(card, run_of("lora", recompute="layers"), config, WORK)
    nearest = nearest_fit(run_of("lora"), config, replace(card, memory_bytes=room), WORK)
    assert (nearest.settings, nearest.peak_bytes, nearest.missing_bytes) == (("train.recompute=layers",), room, 0)
