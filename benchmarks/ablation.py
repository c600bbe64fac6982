"""What each part of fitune's training is worth: tokens a second and memory without it, one change a row.

    python benchmarks/ablation.py [--case NAME] [--rows A,B] [--quick] [--json] [--rounds N] [--threads N]
                                  [--folder DIR] [--output FILE.json]

The first row has everything on. In each other row one part is missing (`speed_switches` says how it is taken away,
from outside), in a fresh process that takes turns with the one that has everything: a step each, after warm-up. So
the ratios are of steps that were taken at the same time; tokens a second are by the median step. Memory is the
resident peak of a process (VmHWM), loading included, after the same number of steps. Where a part cannot be missed
without another one, the row names the row from which it differs by its part alone, and the ratio to that one.
Losses are those of the same rows of tokens from the same start, so they show that a row still computes the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

from speed_alone import Figures, Setting, figures_of, inputs_alone, start_alone
from speed_cases import CASES
from speed_inputs import Inputs
from speed_process import Worker, WorkerFailed
from speed_result import (
    Clock,
    add_options,
    check_options,
    default_computes,
    folders,
    give_result,
    machine_facts,
    title,
    words,
)
from speed_rounds import turns
from speed_switches import SWITCHES, Switch

from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import detect

ROUNDS, QUICK_ROUNDS, WARM_STEPS = 7, 3, 2
FIXED = [case.name for case in CASES.values() if case.has_fixed_rows]
EVERYTHING = "nothing: everything on"
COLUMNS = (
    "without",
    "tokens/s",
    "speed",
    "peak GB",
    "memory",
    "loss differs by",
    "part alone",
    "what else that means",
)


@dataclass
class Row:
    """One line. `speed_ratio` and `memory_ratio` are to everything on.

    Attributes:
        without: the part that is missing.
        whole_tokens_per_second: of everything on, in the same turns.
        largest_loss_difference: of a step, from everything on.
        beside, part_ratio: the row from which it differs by its part alone, and the speed's ratio to that row's.
        problem: why there are no figures.
        is_left_out: whether this machine has nothing to switch off.
    """

    without: str
    note: str = ""
    figures: Figures | None = None
    speed_ratio: float | None = None
    memory_ratio: float | None = None
    whole_tokens_per_second: float | None = None
    largest_loss_difference: float | None = None
    beside: str | None = None
    part_ratio: float | None = None
    problem: str | None = None
    is_left_out: bool = False

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        return found | (found.pop("figures") or {})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=FIXED, default=FIXED[0], help=f"default: {FIXED[0]}")
    parser.add_argument("--rows", type=words, default=[], metavar="A,B", help="parts to be without (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} timed steps a row")
    add_options(parser, ROUNDS, "timed steps of a row")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    names = [switch.name for switch in SWITCHES]
    unknown = [name for name in options.rows if name not in names]
    if unknown:
        parser.error(f"--rows: no part called {', '.join(unknown)} (there are {', '.join(names)})")
    if options.quick:
        options.rounds = min(options.rounds, QUICK_ROUNDS)
    return options


def setting_of(switch: Switch, compute: str, threads: int) -> Setting:
    return Setting(
        compute, threads, recompute=switch.recompute, without=switch.name, environment=switch.environment
    )  # fmt: skip


def replaced(worker: Worker) -> set[str]:
    """The kinds of part that its model has replaced."""
    return {part for part, count in worker.report["replaced"].items() if count}


def row_without(switch: Switch, inputs: Inputs, setting: Setting, whole: Worker, peak_bytes: int, rounds: int) -> Row:
    """A row; `peak_bytes`: of everything on, after so many steps."""
    row = Row(switch.name, switch.note, beside=switch.beside)
    row.problem = switch.obstacle()
    if row.problem is not None:
        row.is_left_out = True
        return row
    try:
        changed = start_alone(inputs, setting)
        try:
            _compare(row, switch, changed, whole, peak_bytes, rounds)
        finally:
            changed.close()
    except WorkerFailed as error:
        row.problem = f"failed: {error}"
    return row


def _compare(row: Row, switch: Switch, changed: Worker, whole: Worker, peak_bytes: int, rounds: int) -> None:
    missing = replaced(whole) - replaced(changed)
    if missing != switch.lost & replaced(whole):
        row.problem = f"failed: what is missing is {sorted(missing) or 'nothing'}, not {sorted(switch.lost)}"
        return
    for _ in range(WARM_STEPS):
        changed.step()
    whole.step()  # it idled while the other one was loaded
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for is_changed, _ in turns(rounds, rounds):
        seconds[is_changed].append((changed if is_changed else whole).step())
    row.figures = figures_of(changed, seconds[True])
    row.whole_tokens_per_second = whole.step_tokens[0] / statistics.median(seconds[False])
    row.speed_ratio = row.figures.tokens_per_second / row.whole_tokens_per_second
    row.memory_ratio = row.figures.peak_bytes / peak_bytes
    pairs = zip(changed.losses, whole.losses, strict=False)
    row.largest_loss_difference = max(abs(one - other) for one, other in pairs)


def set_part_ratios(rows: Sequence[Row]) -> None:
    """From the ratios to everything on, where both rows have one."""
    ratios = {row.without: row.speed_ratio for row in rows}
    for row in rows:
        other = ratios.get(row.beside) if row.beside else None
        if row.speed_ratio is not None and other is not None:
            row.part_ratio = row.speed_ratio / other


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    if row.figures is None or row.speed_ratio is None or row.memory_ratio is None:
        return [row.without, *["-"] * 6, (row.problem or "").replace("\n", " ")]
    part = "" if row.part_ratio is None else f"{row.part_ratio:.2f} of {row.beside}"
    difference = "" if row.largest_loss_difference is None else f"{row.largest_loss_difference:.4f}"
    return [
        row.without, f"{row.figures.tokens_per_second:,.0f}", f"{row.speed_ratio:.2f}",
        f"{row.figures.peak_bytes / 1e9:.2f}", f"{row.memory_ratio:.2f}", difference, part, row.note,
    ]  # fmt: skip


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    threads = options.threads or hardware.threads
    compute = default_computes(hardware)[0]
    clock = Clock()
    facts = machine_facts(hardware, threads)
    chosen = [switch for switch in SWITCHES if not options.rows or switch.name in options.rows]
    with folders(options.folder) as (cache, scratch):
        inputs = inputs_alone(CASES[options.case], cache, scratch / options.case, WARM_STEPS + options.rounds)
        whole = start_alone(inputs, Setting(compute, threads))
        try:
            for _ in range(WARM_STEPS):
                whole.step()
            first = figures_of(whole, [whole.step() for _ in range(options.rounds)])
            rows = [Row(EVERYTHING, figures=first, speed_ratio=1.0, memory_ratio=1.0)]
            clock.say("  ".join(row_cells(rows[0])))
            for switch in chosen:
                setting = setting_of(switch, compute, threads)
                rows.append(row_without(switch, inputs, setting, whole, first.peak_bytes, options.rounds))
                clock.say("  ".join(row_cells(rows[-1])))
        finally:
            whole.close()
    set_part_ratios(rows)
    give_result([row.as_json() for row in rows], facts, clock, options, case=options.case, compute=compute)
    if not options.json:
        print(title(facts))
        print(f"{options.case}, {compute}; speed and memory beside everything on")
        print_table(COLUMNS, [row_cells(row) for row in rows])
    return 1 if any(row.problem and not row.is_left_out for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, WorkerFailed) as error:
        sys.exit(f"error: {error}")
