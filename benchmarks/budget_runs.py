"""Runs with `method: auto` and a memory budget, each inside a hard memory limit: is any killed, is any over budget?

    python benchmarks/budget_runs.py [--runs N] [--seed N] [--json] [--rounds N] [--threads N] [--folder DIR]
                                     [--output FILE.json]

Models, budgets and lengths of rows are drawn at random. Each run is the command, in a control group (version 1 or 2,
which takes root) whose limit is the budget: the kernel kills what takes more. What a run took is what its summary
tells: the resident peak (VmHWM: anonymous and mapped memory). A budget that nothing fits into is refused before
anything is trained; it counts as refused and another is drawn. Stores are made beforehand, as by an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import yaml
from plan_accuracy import LARGE, checkpoint, command, write_text
from speed_inputs import TEXT_MODEL
from speed_result import Clock, add_options, check_options, folders, give_result, machine_facts, title

from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import detect

RUNS, SEED, STEPS = 20, 0, 3
ROWS = 4  # of a step, as is the default
LENGTHS = (256, 512, 1024, 2048)
# From what hardly fits to what fits as it is, in bytes.
BUDGETS = {TEXT_MODEL: (850e6, 3.0e9), LARGE: (1.3e9, 6.0e9)}
COLUMNS = ("model", "rows", "budget GB", "peak GB", "of it", "planned GB", "chosen", "outcome")
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMIT_FILES = ("memory.limit_in_bytes", "memory.max")


@dataclass(frozen=True)
class Draw:
    """A run that was drawn."""

    model: str
    budget_bytes: int
    row_tokens: int


@dataclass(frozen=True)
class Row:
    """What came of it: `outcome` is "done", "refused", "killed", or the command's own words."""

    draw: Draw
    outcome: str
    peak_bytes: int = 0
    planned_bytes: int = 0
    chosen: tuple[str, ...] = ()

    @property
    def is_within(self) -> bool:
        return self.outcome == "refused" or (self.outcome == "done" and self.peak_bytes <= self.draw.budget_bytes)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS, help=f"that train (default {RUNS})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of what is drawn (default {SEED})")
    add_options(parser, STEPS, "steps of a run")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if options.runs < 1:
        parser.error("--runs: at least 1 is needed")
    return options


def draws(seed: int) -> Iterator[Draw]:
    """One after the other, without end."""
    generator = random.Random(seed)
    while True:
        model = generator.choice(list(BUDGETS))
        least, most = BUDGETS[model]
        budget = round(generator.uniform(least, most), -7)
        yield Draw(model, int(budget), generator.choice(LENGTHS))


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[Callable[[], None]]:
    """A control group with this memory limit, as what puts a new process into it.

    Raises InputError where control groups cannot be made.
    """
    for parent, limit_file in zip(GROUPS, LIMIT_FILES, strict=True):
        if (parent / limit_file).is_file() or (parent / "cgroup.subtree_control").is_file():
            break
    else:
        raise InputError("there are no control groups for memory here; this benchmark needs them")
    group = parent / f"fitune-budget-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit_file).write_text(str(limit_bytes))
    except OSError as error:
        raise InputError(f"no control group can be made ({error.strerror}); this benchmark needs root") from error

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        group.rmdir()


def run_of(draw: Draw, model: Path, folder: Path, steps: int, threads: int | None, stores: Path) -> Row:
    """Trains inside the limit."""
    folder.mkdir()
    write_text(folder / "text.jsonl", 2 * steps * ROWS * draw.row_tokens)
    settings: dict[str, Any] = {
        "model": str(model), "method": "auto", "memory": f"{draw.budget_bytes / 1e9:.2f}GB",
        "data": {"train": str(folder / "text.jsonl"), "max_tokens": draw.row_tokens, "over_length": "drop"},
        "train": {"steps": steps, **({"threads": threads} if threads else {})},
    }  # fmt: skip
    run_file, run = folder / "run.yaml", folder / "run"
    run_file.write_text(yaml.safe_dump(settings, sort_keys=False))
    environment = {**os.environ, "FITUNE_CACHE": str(stores), "HF_HUB_OFFLINE": "1"}
    with limited_group(draw.budget_bytes) as enter:
        done = subprocess.run(
            [sys.executable, "-m", "fitune", "train", str(run_file), f"output={run}", "--json"], env=environment,
            capture_output=True, text=True, check=False, preexec_fn=enter,
        )  # fmt: skip
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
        outcome = "killed" if done.returncode < 0 else "refused" if "are too few" in done.stderr else words
        return Row(draw, outcome)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    chosen = tuple(f"{choice['setting'].removeprefix('train.')}={choice['value']}" for choice in plan["choices"])
    return Row(draw, "done", summary["peak_bytes"], plan["peak_bytes"], chosen)


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    draw = row.draw
    share = f"{row.peak_bytes / draw.budget_bytes:.2f}" if row.peak_bytes else "-"
    return [
        draw.model, f"{ROWS} x {draw.row_tokens}", f"{draw.budget_bytes / 1e9:.2f}", f"{row.peak_bytes / 1e9:.2f}",
        share, f"{row.planned_bytes / 1e9:.2f}", " ".join(row.chosen), row.outcome,
    ]  # fmt: skip


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    clock = Clock()
    facts = machine_facts(hardware, options.threads or hardware.threads)
    rows: list[Row] = []
    with folders(options.folder) as (cache, scratch):
        stores = scratch / "stores"
        for model in BUDGETS:
            _make_store(checkpoint(model, cache), scratch, stores)
        for number, draw in enumerate(draws(options.seed)):
            if sum(row.outcome != "refused" for row in rows) >= options.runs:
                break
            folder = scratch / f"run-{number}"
            rows.append(run_of(draw, checkpoint(draw.model, cache), folder, options.rounds, options.threads, stores))
            clock.say("  ".join(row_cells(rows[-1])))
    give_result([asdict(row) | {"is_within": row.is_within} for row in rows], facts, clock, options)
    if not options.json:
        print(title(facts))
        print_table(COLUMNS, [row_cells(row) for row in rows])
        print(f"{sum(row.is_within for row in rows)} of {len(rows)} stayed within their budget or were refused")
    return 0 if all(row.is_within for row in rows) else 1


def _make_store(model: Path, scratch: Path, stores: Path) -> None:
    """As a first run of the model would."""
    folder = scratch / f"store-{model.name}"
    folder.mkdir()
    write_text(folder / "text.jsonl", 1000)
    run_file = folder / "run.yaml"
    train = {"steps": 1, "micro_batch": 1}
    data = {"train": str(folder / "text.jsonl"), "max_tokens": 256, "over_length": "drop"}
    run_file.write_text(yaml.safe_dump({"model": str(model), "method": "qlora", "data": data, "train": train}))
    environment = {**os.environ, "FITUNE_CACHE": str(stores), "HF_HUB_OFFLINE": "1"}
    command(["train", str(run_file), f"output={folder / 'run'}", "--json"], environment)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
