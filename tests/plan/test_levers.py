"""The variants of a run: which there are, in which order, and that a step stays the same step."""

from __future__ import annotations

from typing import Any

from fitune.config.schema import RunConfig
from fitune.plan.levers import variants

ROW_TOKENS = 512


def run_of(method: str = "auto", **train: Any) -> RunConfig:
    return RunConfig.model_validate({"method": method, "data": {"train": ["none"]}, "train": train})


def test_the_quickest_comes_first_and_is_the_run_as_it_is() -> None:
    found = variants(run_of("qlora"), ROW_TOKENS)
    assert found[0].choices == ()
    assert found[0].run.train == run_of("qlora").train
    times = [variant.relative_time for variant in found]
    assert times == sorted(times)


def test_every_variant_has_the_rows_of_a_step() -> None:
    for variant in variants(run_of(accumulation=3), ROW_TOKENS):
        assert variant.run.train.micro_batch * variant.run.train.accumulation == 4 * 3


def test_what_is_given_stays() -> None:
    given = run_of("lora", micro_batch=8, recompute="none", optimizer="adamw")
    (only,) = variants(given, ROW_TOKENS)
    assert only.run == given
    assert only.choices == ()


def test_auto_is_lora_before_qlora_and_only_four_bits_are_read_from_the_disk() -> None:
    found = variants(run_of(micro_batch=1, recompute="none"), ROW_TOKENS)
    assert [(variant.run.method, variant.streams) for variant in found] == [
        ("lora", False), ("qlora", False), ("qlora", True),
    ]  # fmt: skip


def test_full_may_keep_its_states_in_eight_bits_and_is_never_streamed() -> None:
    found = variants(run_of("full", micro_batch=1), ROW_TOKENS)
    ways = [(v.run.train.optimizer, v.run.train.optimizer_states) for v in found if v.run.train.recompute == "none"]
    assert ways == [("adamw", "memory"), ("adamw8bit", "memory"), ("adamw", "disk"), ("adamw8bit", "disk")]
    assert not any(variant.streams for variant in found)
    assert {variant.run.train.optimizer for variant in variants(run_of("qlora"), ROW_TOKENS)} == {"adamw"}


def test_modules_trained_whole_may_have_their_states_so_too() -> None:
    plain = run_of("lora", micro_batch=1, recompute="none")
    whole = plain.model_copy(update={"lora": plain.lora.model_copy(update={"modules_to_save": ("lm_head",)})})
    assert len(variants(plain, ROW_TOKENS)) == 1
    ways = {
        (variant.run.train.optimizer, variant.run.train.optimizer_states) for variant in variants(whole, ROW_TOKENS)
    }
    assert ways == {("adamw", "memory"), ("adamw8bit", "memory"), ("adamw", "disk"), ("adamw8bit", "disk")}


def test_what_cannot_lie_on_disk_stays_in_memory() -> None:
    found = variants(run_of("full", micro_batch=1, optimizer="adafactor"), ROW_TOKENS)
    assert {(v.run.train.optimizer, v.run.train.optimizer_states) for v in found} == {("adafactor", "memory")}


def test_long_rows_are_split_before_they_are_computed_again() -> None:
    found = variants(run_of("qlora"), 2048)
    split = next(v for v in found if v.run.train.micro_batch == 1 and v.run.train.recompute == "none")
    again = next(v for v in found if v.run.train.micro_batch == 4 and v.run.train.recompute == "layers")
    assert found.index(split) < found.index(again)


def test_every_choice_says_why() -> None:
    for variant in variants(run_of(), ROW_TOKENS):
        for choice in variant.choices:
            assert choice.reason
            section, _, name = choice.setting.rpartition(".")
            holder = getattr(variant.run, section) if section else variant.run
            assert getattr(holder, name) == choice.value
