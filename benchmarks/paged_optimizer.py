"""Full fine-tuning with the optimizer's states and gradients in memory and on disk: peak, time, and the same losses.

    python benchmarks/paged_optimizer.py [--sides disk,memory] [--limit 8GB] [--optimizer adamw] [--model NAME]
                                         [--json] [--rounds N] [--threads N] [--folder DIR] [--output FILE.json]

The 1.1B Llama shape with random weights on the project's own documentation, one row of 512 tokens a step, layers
recomputed. Each side is a fresh process, the disk side within a hard memory limit where one is given (a control
group: for root only). Peak is what the process held at most (VmHWM); time is the median of the steps after the first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import yaml
from plan_accuracy import LARGE, Case, checkpoint, settings_of, write_text
from speed_inputs import TEXT_MODEL
from speed_process import Worker, WorkerFailed, room_bytes
from speed_result import Clock, add_options, check_options, folders, give_result, machine_facts, title, words

from fitune.cli.output import print_table
from fitune.config.byte_size import parse_bytes
from fitune.errors import InputError
from fitune.hardware import CGROUPS, PROC, cgroup_folders, detect
from fitune.models.find import find_model

ROUNDS = 4
ROW_TOKENS = 512
LEARNING_RATE = 1e-5
SIDES = ("disk", "memory")
COLUMNS = ("optimizer states", "peak GB", "s a step", "memory limit", "losses")
# What the side in memory holds at least: masters, gradients and states; and what it needs besides.
BYTES_A_PARAMETER = {"adamw": 16, "adamw8bit": 10}
OTHER_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Row:
    """A side's figures; `problem` says why there are none."""

    optimizer_states: str
    peak_bytes: int = 0
    load_peak_bytes: int = 0
    seconds: float = 0.0
    limit_bytes: int | None = None
    losses: list[float] = field(default_factory=list)
    problem: str | None = None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sides", type=words, default=list(SIDES), metavar="A,B", help="disk, memory (default: both)"
    )
    parser.add_argument("--limit", type=_amount, default=None, metavar="SIZE", help="of the disk side's memory")
    parser.add_argument("--optimizer", choices=sorted(BYTES_A_PARAMETER), default="adamw")
    parser.add_argument("--model", choices=(LARGE, TEXT_MODEL), default=LARGE)
    add_options(parser, ROUNDS, "timed steps")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if not options.sides or set(options.sides) - set(SIDES):
        parser.error(f"--sides: {', '.join(SIDES)} are known")
    return options


def _amount(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[None]:
    """Holds this process, and those it starts meanwhile, to so much memory, page cache included.

    Raises InputError where the system does not let it.
    """
    own = next(iter(cgroup_folders(PROC, CGROUPS, "memory")), None)
    names = ("memory.limit_in_bytes", "memory.max")  # of control groups of version 1 and 2
    name = next((name for name in names if own is not None and (own / name).is_file()), None)
    if own is None or name is None:
        raise InputError("no memory controller is mounted at /sys/fs/cgroup", where="--limit")
    group = own / f"fitune-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        raise InputError(f"{group} cannot be used: {error.strerror}", where="--limit") from error
    try:
        yield
    finally:
        (own / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def measured(side: str, options: argparse.Namespace, cache: Path, scratch: Path, needed_bytes: int) -> Row:
    """Trains the steps of one side in a process of its own."""
    if side == "memory" and room_bytes() < needed_bytes:
        return Row(side, problem=f"needs some {needed_bytes / 1e9:.0f} GB, {room_bytes() / 1e9:.0f} GB are available")
    folder = scratch / side
    folder.mkdir()
    steps = 1 + options.rounds
    write_text(folder / "text.jsonl", 2 * steps * ROW_TOKENS)
    case = Case(options.model, "full", 1, ROW_TOKENS, compute="auto", recompute="layers", optimizer=options.optimizer)
    settings = settings_of(
        case, checkpoint(options.model, cache), folder / "text.jsonl", steps, options.threads
    )  # fmt: skip
    settings["train"] |= {"optimizer_states": side, "learning_rate": LEARNING_RATE}
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings, sort_keys=False))
    spec = {"side": "fitune", "steps": None, "adapter": None, "run_file": str(run_file)}
    limit = options.limit if side == "disk" else None
    threads = options.threads or detect(with_accelerators=False).threads
    with nullcontext() if limit is None else memory_limit(limit):
        try:
            worker = Worker(spec, folder, threads)
        except WorkerFailed as error:
            return Row(side, limit_bytes=limit, problem=str(error))
        try:
            for _ in range(steps):
                worker.step()
            peak, _ = worker.memory()
        except WorkerFailed as error:
            return Row(side, limit_bytes=limit, problem=str(error))
        finally:
            worker.close()
    seconds = statistics.median(worker.seconds[1:])
    return Row(side, peak, worker.load_peak_bytes, seconds, limit, worker.losses)


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    if row.problem is not None:
        return [row.optimizer_states, *["-"] * 3, row.problem.replace("\n", " ")]
    limit = "-" if row.limit_bytes is None else f"{row.limit_bytes / 1e9:.1f} GB"
    losses = " ".join(f"{loss:.4f}" for loss in row.losses)
    return [row.optimizer_states, f"{row.peak_bytes / 1e9:.2f}", f"{row.seconds:.1f}", limit, losses]


def parameters_of(model: Path) -> int:
    """How many numbers a checkpoint holds."""
    source = find_model(str(model))
    return sum(prod(source.shape(name)) for name in source.tensor_names())


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    clock = Clock()
    facts = machine_facts(hardware, options.threads or hardware.threads)
    rows: list[Row] = []
    with folders(options.folder) as (cache, scratch):
        parameters = parameters_of(checkpoint(options.model, cache))
        needed = BYTES_A_PARAMETER[options.optimizer] * parameters + OTHER_BYTES
        for side in options.sides:
            rows.append(measured(side, options, cache, scratch, needed))
            clock.say("  ".join(row_cells(rows[-1])))
    found = [row.losses for row in rows if row.problem is None]
    same = all(losses == found[0] for losses in found)
    give_result(
        [asdict(row) for row in rows], facts, clock, options, parameters=parameters,
        adamw_states_bytes=8 * parameters, same_losses=same if len(found) > 1 else None,
    )  # fmt: skip
    if not options.json:
        print(title(facts))
        print(f"{parameters:,} parameters: AdamW's states alone are {8 * parameters / 1e9:.2f} GB")
        print_table(COLUMNS, [row_cells(row) for row in rows])
        if len(found) > 1:
            print("the losses are the same, to the bit" if same else "the losses differ")
    return 1 if any(row.problem for row in rows) or not same else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
