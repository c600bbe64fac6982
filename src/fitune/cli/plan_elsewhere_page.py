"""The plan for a machine that is not this one: its page, its JSON, and what would fit where it does not."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from fitune.cli.output import gigabytes, print_facts, print_json
from fitune.cli.plan_page import print_choices, print_memory, settings_lines

if TYPE_CHECKING:
    from fitune.config.schema import RunConfig
    from fitune.models.source import ModelSource
    from fitune.plan.elsewhere import ElsewherePlan
    from fitune.plan.machines import Machine
    from fitune.plan.nearest_fit import NearestFit
    from fitune.plan.planner import Plan, Workload
    from fitune.plan.sharding import Sharding


def show_elsewhere(
    plan: Plan, run: RunConfig, source: ModelSource, machine: Machine, workload: Workload, assumed: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Prints the plan; where it does not fit, looks for the nearest that does."""
    from fitune.plan.elsewhere import ElsewherePlan, sharding_on
    from fitune.plan.nearest_fit import nearest_fit, search

    assert isinstance(plan, ElsewherePlan)
    config = source.config
    nearest = None if plan.fits else nearest_fit(run, config, machine, workload)
    nearest_sharded = None
    if not plan.fits and plan.sharding is not None and not plan.sharding.fits:
        nearest_sharded = search(
            run, workload, machine.memory_bytes, lambda r, w: sharding_on(machine, r, config, w).peak_bytes
        )
    note, warnings = source.note, source.warnings()
    if as_json:
        found = {"nearest": nearest, "nearest_sharded": nearest_sharded}
        facts = {name: None if one is None else asdict(one) for name, one in found.items()}
        print_json({**plan.as_dict(), **facts, "assumed": assumed, "note": note, "warnings": warnings})
        return
    _print_page(plan, nearest, nearest_sharded)
    if assumed:
        print(f"\n{assumed}" + (f"\nNote: {note}." if note else ""))


def _print_page(plan: ElsewherePlan, nearest: NearestFit | None, nearest_sharded: NearestFit | None) -> None:
    machine = plan.machine
    several = f"{machine.count} x " if machine.count > 1 else ""
    print(f"Plan: {plan.method} on {plan.model}, for {several}{machine.name}\n")
    print_memory(plan, "on each" if several else "", machine.source)
    print_choices(plan)
    print(f"\n{fit_sentence(plan)}")
    if plan.sharding is not None:
        _print_sharding(plan.sharding, plan)
    if nearest is not None:
        print(f"\n{nearest_sentence(nearest)}")
    if nearest_sharded is not None:
        print(f"Sharded: {nearest_sentence(nearest_sharded)}")
    print()
    print_facts("Settings", settings_lines(plan))
    print()
    for note in plan.notes:
        print(note)


def fit_sentence(plan: ElsewherePlan) -> str:
    """Whether the plan fits, in numbers."""
    left = plan.limit_bytes - plan.peak_bytes
    each = " on each, which holds everything" if plan.machine.count > 1 else ""
    if left >= 0:
        return f"It fits: {gigabytes(left)} stay free{each}."
    return f"It does not fit: {gigabytes(-left)} are missing{each}."


def nearest_sentence(nearest: NearestFit) -> str:
    """What to change, as it is typed."""
    if not nearest.settings:
        return "Nothing that can be set makes it smaller."
    changes = " ".join(nearest.settings)
    if nearest.missing_bytes:
        missing = gigabytes(nearest.missing_bytes)
        return f"Nothing that can be set makes it fit: with {changes} {missing} are missing."
    return f"The nearest that fits: {changes}, which takes {gigabytes(nearest.peak_bytes)}."


def _print_sharding(sharding: Sharding, plan: ElsewherePlan) -> None:
    count = plan.machine.count
    left = plan.available_bytes - sharding.peak_bytes
    verdict = f"it fits, {gigabytes(left)} stay free" if left >= 0 else f"{gigabytes(-left)} are missing"
    print(f"\nSharded over the {count} (FSDP, ZeRO-3): {gigabytes(sharding.peak_bytes)} on each; {verdict}.")
    print_facts(
        "It costs",
        {
            "its part of weights, gradients, states": gigabytes(sharding.shard_bytes),
            "whole at one time: two layers, head": gigabytes(sharding.gathered_bytes),
            "not divided: activations, CUDA": gigabytes(sharding.unsharded_bytes),
            "received to gather weights, twice": f"{gigabytes(sharding.gather_bytes_per_micro_batch)} a micro-batch",
            "received to sum gradients, once": f"{gigabytes(sharding.reduce_bytes_per_micro_batch)} a micro-batch",
            "received in a step": gigabytes(sharding.bytes_per_step),
        },
    )
