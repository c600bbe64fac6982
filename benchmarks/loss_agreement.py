"""Whether fitune's losses are the peer's: step by step, from the same weights, adapter and rows of tokens.

    python benchmarks/loss_agreement.py [--cases A,B] [--json] [--rounds STEPS] [--threads N] [--folder DIR]
                                        [--output FILE.json]

What is right is the peer in float32 (transformers + PEFT + bitsandbytes, `bnb_4bit_compute_dtype=float32`). Beside
it, each in a process of its own, run the peer's ways in bfloat16 and fitune's computations. A row tells how far its
losses lie from those in float32, and from the peer's in pure bfloat16. The measure is the peer's own: fitune in
bfloat16 agrees where it is no further from float32 than the further of the peer's ways in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

from speed_cases import CASES, QUICK_CASES, Variant
from speed_inputs import Inputs, prepared_inputs, write_run_file
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
from speed_rounds import Method, start_ours, start_peer

from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import detect

STEPS = 16
EXACT = Variant(False, False, float32=True)
PEERS = (Variant(False, False), Variant(True, False))
FIXED = [case.name for case in CASES.values() if case.has_fixed_rows]
COLUMNS = ("case", "side", "first loss", "last", "from float32", "at most", "from pure bf16", "at most")


@dataclass
class Row:
    """One side on one case.

    Attributes:
        losses: of every step.
        mean_distance, largest_distance: of a step's loss from the peer's in float32.
        mean_from_peer, largest_from_peer: the same from the peer's in pure bfloat16.
    """

    case: str
    side: str
    losses: list[float] = field(default_factory=list)
    mean_distance: float | None = None
    largest_distance: float | None = None
    mean_from_peer: float | None = None
    largest_from_peer: float | None = None
    problem: str | None = None

    def measure(self, exact: Sequence[float], peer: Sequence[float]) -> None:
        """Sets the distances."""
        self.mean_distance, self.largest_distance = distances(self.losses, exact)
        self.mean_from_peer, self.largest_from_peer = distances(self.losses, peer)


def distances(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean and largest of what lies between two runs' losses, step by step."""
    apart = [abs(one - other) for one, other in zip(losses, others, strict=True)]
    return statistics.mean(apart), max(apart)


def agrees(rows: Sequence[Row], ours: str) -> bool:
    """Whether a side is no further from float32 than the further of the peer's in bfloat16: mean and largest."""
    found = {row.side: row for row in rows}
    peers = [found[variant.name] for variant in PEERS]
    return all(
        getattr(found[ours], name) <= max(getattr(peer, name) for peer in peers)
        for name in ("mean_distance", "largest_distance")
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", type=words, default=list(QUICK_CASES), metavar="A,B", help=f"of {', '.join(FIXED)}"
    )
    add_options(parser, STEPS, "steps of each side")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    unknown = [name for name in options.cases if name not in FIXED]
    if unknown:
        parser.error(f"--cases: no case called {', '.join(unknown)} (there are {', '.join(FIXED)})")
    return options


def sides(inputs: Inputs, computes: Sequence[str], method: Method) -> Iterator[tuple[str, Worker | WorkerFailed]]:
    """The name and process of every side, one after the other; the peer in float32 first, then in pure bfloat16."""
    for variant in (EXACT, *PEERS):
        try:
            yield variant.name, start_peer(inputs, variant, method)
        except WorkerFailed as error:
            yield variant.name, error
    for compute in computes:
        run_file = inputs.scratch / f"run-{compute}.yaml"
        write_run_file(
            inputs.case, inputs.model, inputs.data, run_file,
            compute=compute, recompute="none", threads=method.threads,
        )  # fmt: skip
        try:
            yield side_of(compute), start_ours(inputs, run_file, method.threads)
        except WorkerFailed as error:
            yield side_of(compute), error


def side_of(compute: str) -> str:
    """What our side is called in a computation."""
    return f"fitune, {compute}"


def rows_of(inputs: Inputs, computes: Sequence[str], method: Method) -> list[Row]:
    """All rows of a case. Without the peer's first two there are no distances."""
    rows: list[Row] = []
    for name, worker in sides(inputs, computes, method):
        row = Row(inputs.case.name, name)
        rows.append(row)
        if isinstance(worker, WorkerFailed):
            row.problem = str(worker)
            continue
        try:
            for _ in range(method.rounds):
                worker.step()
            row.losses = list(worker.losses)
        except WorkerFailed as error:
            row.problem = str(error)
        finally:
            worker.close()
    exact, peer = rows[:2]
    if exact.problem is None and peer.problem is None:
        for row in rows:
            if row.problem is None:
                row.measure(exact.losses, peer.losses)
    return rows


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    if row.problem is not None or row.mean_distance is None:
        return [row.case, row.side, *["-"] * 5, (row.problem or "no peer to compare with").replace("\n", " ")]
    found = (row.mean_distance, row.largest_distance, row.mean_from_peer, row.largest_from_peer)
    return [
        row.case, row.side, f"{row.losses[0]:.4f}", f"{row.losses[-1]:.4f}", *(f"{value:.5f}" for value in found)
    ]  # fmt: skip


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    method = Method(options.rounds, warm_steps=0, trial_steps=0, threads=options.threads or hardware.threads)
    computes = list(dict.fromkeys(["float32", *default_computes(hardware)]))
    clock = Clock()
    facts = machine_facts(hardware, method.threads, ("bitsandbytes", "accelerate"))
    rows: list[Row] = []
    verdicts: dict[str, Any] = {}
    with folders(options.folder) as (cache, scratch):
        for name in options.cases:
            inputs = prepared_inputs(CASES[name], cache, scratch / name, None, 0, options.rounds)
            found = rows_of(inputs, computes, method)
            rows += found
            for row in found:
                clock.say("  ".join(row_cells(row)))
            if not any(row.problem for row in found):
                verdicts[name] = {compute: agrees(found, side_of(compute)) for compute in computes}
    give_result([asdict(row) for row in rows], facts, clock, options, agrees=verdicts)
    if not options.json:
        print(title(facts))
        print_table(COLUMNS, [row_cells(row) for row in rows])
        for name, verdict in verdicts.items():
            for compute, holds in verdict.items():
                print(f"{name}, {compute}: {'within' if holds else 'outside'} the peer's own distance from float32")
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
