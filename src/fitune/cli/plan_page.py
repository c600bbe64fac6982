"""A plan for people: what memory goes where, whether it fits, how long it takes, and what was decided and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fitune.cli.output import gigabytes, print_facts, print_table

if TYPE_CHECKING:
    from fitune.plan.planner import Item, Plan


def print_plan(plan: Plan) -> None:
    """The plan's page."""
    from fitune.train.progress_view import clock

    print(f"Plan: {plan.method} on {plan.model}\n")
    print_memory(plan)
    print_choices(plan)
    print(f"\n{fits_sentence(plan)}\n")
    lines = settings_lines(plan)
    if plan.seconds_per_step is not None:
        in_all = f", {clock(plan.seconds)} in all" if plan.seconds else ""
        lines["time"] = f"{plan.seconds_per_step:.2f} s a step{in_all}  (probe)"
    print_facts("Settings", lines)


def print_memory(plan: Plan, where: str = "", available_from: str = "machine") -> None:
    """The items, their sum and what there is; `where` they are, and where it is known from how much there is."""
    rows = [(item.name, gigabytes(float(item.value)), item.origin) for item in plan.memory]
    rows.append(("peak", gigabytes(plan.peak_bytes), f"highest at {plan.peak_operator}"))
    rows.append(("available", gigabytes(plan.available_bytes), available_from))
    if plan.budget_bytes is not None:
        rows.append(("budget", gigabytes(plan.budget_bytes), "you"))
    print_table((f"memory {where}".strip(), "size", "origin"), rows)


def print_choices(plan: Plan) -> None:
    """The settings that were chosen, and why; nothing where none were."""
    if plan.choices:
        print()
        print_facts("Chosen to stay within it", {c.setting: f"{c.value}  ({c.reason})" for c in plan.choices})


def settings_lines(plan: Plan) -> dict[str, str]:
    """Every setting's value and origin."""
    return {item.name: _value(item) for item in plan.settings}


def fits_sentence(plan: Plan) -> str:
    """Whether the plan fits, in numbers."""
    left = plan.limit_bytes - plan.peak_bytes
    if left >= 0:
        return f"It fits: {gigabytes(left)} stay free."
    full = "train.optimizer=adamw8bit; train.optimizer_states=disk; or method lora or qlora"
    smaller = full if plan.method == "full" else "lora.rank; or method qlora"
    return (
        f"It does not fit: {gigabytes(-left)} are missing. Smaller: train.micro_batch, data.max_tokens; "
        f"train.recompute=layers; {smaller}. memory=auto chooses what fits"
    )


def _value(item: Item) -> str:
    if item.unit == "bytes":
        return f"{gigabytes(float(item.value))}  ({item.origin})"
    value = f"{item.value:,}" if isinstance(item.value, int) else f"{item.value}"
    return f"{value} {item.unit}".strip() + f"  ({item.origin})"
