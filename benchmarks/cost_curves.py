"""What a training step of fitune costs against what it is made of: tokens a second and memory along four curves.

    python benchmarks/cost_curves.py [--only NAME,...] [--model NAME] [--json] [--rounds N] [--threads N]
                                     [--folder DIR] [--output FILE.json]

    tokens    tokens of a step, 256 to 8192, in rows of 256
    length    length of a row, 256 to 8192, at 8192 tokens a step
    rank      of the adapter on all linear layers, 4 to 128, at 4 rows of 512
    threads   1, 2, 4 ... to what the machine has, at 4 rows of 512

Each point is a fresh process that makes its store and trains on real text: one step to warm up, then the timed ones.
Tokens a second are by the median step, memory is the resident peak of the process (VmHWM), loading included. A point
that lies on two curves is measured once. Points are not measured at the same time, so a machine that drifts bends
the curves.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

from speed_alone import Figures, Setting, figures_of, inputs_alone, start_alone
from speed_cases import MODELS, RANK, Case
from speed_inputs import TEXT_MODEL, Inputs
from speed_process import WorkerFailed
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

from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import detect

ROUNDS, WARM_STEPS = 3, 1
SIZES = (256, 512, 1024, 2048, 4096, 8192)
RANKS = (4, 8, 16, 32, 64, 128)
USUAL_ROWS, USUAL_ROW_TOKENS = 4, 512
COLUMNS = ("tokens/s", "ms a step", "peak GB")


@dataclass(frozen=True)
class Point:
    """What a step is made of."""

    rows: int
    row_tokens: int
    rank: int
    threads: int

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


Curve = dict[int, Point]  # value on its axis -> point


def curves(threads: int, most_threads: int) -> dict[str, Curve]:
    """All curves, by name; `threads` where they are not what changes."""

    def usual(rank: int, count: int) -> Point:
        return Point(USUAL_ROWS, USUAL_ROW_TOKENS, rank, count)

    counts = [count for count in (2**power for power in range(12)) if count < most_threads] + [most_threads]
    return {
        "tokens": {size: Point(size // SIZES[0], SIZES[0], RANK, threads) for size in SIZES},
        "length": {size: Point(SIZES[-1] // size, size, RANK, threads) for size in SIZES},
        "rank": {rank: usual(rank, threads) for rank in RANKS},
        "threads": {count: usual(RANK, count) for count in counts},
    }


AXES = {"tokens": "tokens a step", "length": "row length", "rank": "rank", "threads": "threads"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=words, default=list(AXES), metavar="A,B", help=f"of {', '.join(AXES)}")
    parser.add_argument("--model", choices=list(MODELS), default=TEXT_MODEL, help=f"default: {TEXT_MODEL}")
    add_options(parser, ROUNDS, "timed steps of a point")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    unknown = [name for name in options.only if name not in AXES]
    if unknown:
        parser.error(f"--only: no curve called {', '.join(unknown)} (there are {', '.join(AXES)})")
    return options


def measured(point: Point, inputs: Inputs, compute: str, rounds: int) -> Figures:
    """The figures of a point. Raises WorkerFailed."""
    worker = start_alone(inputs, Setting(compute, point.threads, rank=point.rank))
    try:
        for _ in range(WARM_STEPS):
            worker.step()
        return figures_of(worker, [worker.step() for _ in range(rounds)])
    finally:
        worker.close()


def row_of(curve: str, value: int, point: Point, figures: Figures | str) -> dict[str, Any]:
    """One point of one curve as JSON; figures that are words are the reason why there are none."""
    found = {"problem": figures} if isinstance(figures, str) else asdict(figures)
    return {"curve": curve, "value": value, **asdict(point), "tokens": point.tokens, **found}


def row_cells(row: dict[str, Any]) -> list[str]:
    """A row of a curve's table."""
    if "problem" in row:
        return [str(row["value"]), "-", "-", row["problem"].replace("\n", " ")]
    rate = row["tokens_per_second"]
    milliseconds = 1e3 * row["tokens"] / rate
    return [str(row["value"]), f"{rate:,.0f}", f"{milliseconds:,.0f}", f"{row['peak_bytes'] / 1e9:.2f}"]


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    threads = options.threads or hardware.threads
    compute = default_computes(hardware)[0]
    clock = Clock()
    facts = machine_facts(hardware, threads)
    wanted = {name: curve for name, curve in curves(threads, hardware.threads).items() if name in options.only}
    inputs: dict[tuple[int, int], Inputs] = {}
    known: dict[Point, Figures | str] = {}
    rows: list[dict[str, Any]] = []
    with folders(options.folder) as (cache, scratch):
        for name, curve in wanted.items():
            for value, point in curve.items():
                shape = (point.rows, point.row_tokens)
                if shape not in inputs:
                    case = Case(f"{options.model}-{point.rows}x{point.row_tokens}", options.model, *shape, 0, 0)
                    inputs[shape] = inputs_alone(case, cache, scratch / case.name, WARM_STEPS + options.rounds)
                if point not in known:
                    try:
                        known[point] = measured(point, inputs[shape], compute, options.rounds)
                    except WorkerFailed as error:
                        known[point] = f"failed: {error}"
                rows.append(row_of(name, value, point, known[point]))
                clock.say(f"{AXES[name]}: {'  '.join(row_cells(rows[-1]))}")
    give_result(rows, facts, clock, options, model=options.model, compute=compute)
    if not options.json:
        print(title(facts))
        print(f"{options.model}, {compute}, rank {RANK}")
        for name in wanted:
            print()
            print_table((AXES[name], *COLUMNS), [row_cells(row) for row in rows if row["curve"] == name])
    return 1 if any("problem" in row for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
