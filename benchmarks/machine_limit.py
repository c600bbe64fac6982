"""How near a training step of fitune comes to what the machine can multiply.

    python benchmarks/machine_limit.py [--cases A,B] [--size N] [--json] [--rounds N] [--threads N] [--folder DIR]
                                       [--output FILE.json]

The machine's limit is the median rate of torch's own product of two N x N matrices (default 4096): torch.mm in
bfloat16 and float32, torch._int_mm in 8-bit integers where this torch has it. Steps of fitune, in a process of their
own, take turns with it. Of a step

    fraction = (sum over its parts of operations / limit in the format that the part is computed in) / seconds

with the operations that `speed_operations` counts, and seconds of the median step, in which all is contained:
decoding, norms, softmax, optimizer, Python. With train.compute int8 the frozen products are set against the limit in
8-bit integers, the other parts against that in bfloat16; otherwise all parts have one format.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from speed_alone import Setting, figures_of, inputs_alone, start_alone
from speed_cases import CASES, QUICK_CASES, RANK, chosen_cases
from speed_inputs import Inputs
from speed_operations import Operations, count_operations
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
from fitune.models.find import find_model

ROUNDS, WARM_STEPS, SIZE = 7, 2, 4096
COLUMNS = (
    "case",
    "compute",
    "tokens/s",
    "Gop a step",
    "frozen",
    "adapters",
    "attention",
    "head",
    "Gop/s",
    "of limit",
)

Products = dict[str, Callable[[], object]]


def products(size: int) -> Products:
    """format -> one product of large matrices in it, for the formats that torch multiplies here."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=draw) for _ in range(2))
    found: Products = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        x, weight = left.to(dtype), right.to(dtype)
        found[name] = partial(torch.mm, x, weight.t())
    codes = [(32 * x).clamp(-127, 127).to(torch.int8) for x in (left, right)]
    try:
        torch._int_mm(codes[0][:32, :32].contiguous(), codes[1][:32, :32].contiguous())
    except (AttributeError, NotImplementedError, RuntimeError):
        return found
    found["int8"] = partial(torch._int_mm, *codes)
    return found


class Limits:
    """Rates of products, measured whenever there is time between steps."""

    def __init__(self, size: int) -> None:
        self._products = products(size)
        self._operations = 2 * size**3
        self._seconds: dict[str, list[float]] = {name: [] for name in self._products}
        for product in self._products.values():
            product()

    def measure(self) -> None:
        """One product in each format."""
        for name, product in self._products.items():
            begun = time.perf_counter()
            product()
            self._seconds[name].append(time.perf_counter() - begun)

    def rates(self) -> dict[str, float]:
        """format -> operations a second, by the median product of all so far; 0.0 where there is none."""
        return {
            name: self._operations / statistics.median(seconds)
            for name, seconds in self._seconds.items()
            if seconds
        }  # fmt: skip


def limit_seconds(operations: Operations, compute: str, rates: dict[str, float]) -> float | None:
    """What the products of a step take at the limit; None where it is not known for a format."""
    rest = "bfloat16" if compute == "int8" else compute
    formats = {part: compute if part == "frozen" else rest for part in asdict(operations)}
    if not set(formats.values()) <= rates.keys():
        return None
    return sum(count / rates[formats[part]] for part, count in asdict(operations).items())


def row_of(inputs: Inputs, compute: str, threads: int, rounds: int, limits: Limits) -> dict[str, Any]:
    """One line; with `problem` where fitune could not or would not train."""
    case = inputs.case
    row: dict[str, Any] = {"case": case.name, "compute": compute}
    try:
        worker = start_alone(inputs, Setting(compute, threads))
    except WorkerFailed as error:
        word = "fitune refuses it" if error.is_refusal else "failed"
        return row | {"problem": f"{word}: {error}", "is_refusal": error.is_refusal}
    try:
        for _ in range(WARM_STEPS):
            worker.step()
        seconds = []
        for _ in range(rounds):
            seconds.append(worker.step())
            limits.measure()
        figures = figures_of(worker, seconds)
    except WorkerFailed as error:
        return row | {"problem": f"failed: {error}", "is_refusal": False}
    finally:
        worker.close()
    operations = count_operations(find_model(str(inputs.model)).config, case.rows, case.row_tokens, RANK)
    return row | asdict(figures) | {"operations": asdict(operations) | {"total": operations.total}}


def set_fractions(rows: Sequence[dict[str, Any]], rates: dict[str, float]) -> None:
    """Adds to every row what it reached of the limit, by the rates of the whole run."""
    for row in rows:
        if "operations" not in row:
            continue
        counted = Operations(**{name: count for name, count in row["operations"].items() if name != "total"})
        step = statistics.median(row["step_seconds"])
        least = limit_seconds(counted, row["compute"], rates)
        row["operations_per_second"] = counted.total / step
        row["fraction_of_limit"] = None if least is None else least / step


def row_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    if "problem" in row:
        return [row["case"], row["compute"], *["-"] * 7, row["problem"].replace("\n", " ")]
    counts = row["operations"]
    shares = [f"{counts[part] / counts['total']:.0%}" for part in ("frozen", "adapters", "attention", "head")]
    fraction = row["fraction_of_limit"]
    return [
        row["case"], row["compute"], f"{row['tokens_per_second']:,.0f}", f"{counts['total'] / 1e9:,.0f}", *shares,
        f"{row['operations_per_second'] / 1e9:,.0f}", "unknown" if fraction is None else f"{fraction:.0%}",
    ]  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=words, default=list(QUICK_CASES), metavar="A,B", help="of train_speed.py")
    parser.add_argument("--size", type=int, default=SIZE, help=f"of the large matrices (default {SIZE})")
    add_options(parser, ROUNDS, "timed steps of a row, and products of each format beside it")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if options.size < 32:
        parser.error("--size: at least 32 is needed")
    try:
        options.cases = chosen_cases(options.cases, has_alpaca=False)
    except ValueError as error:
        parser.error(f"--cases: {error} (of fixed rows: {', '.join(c.name for c in CASES.values() if c.rows)})")
    return options


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    threads = options.threads or hardware.threads
    torch.set_num_threads(threads)
    clock = Clock()
    facts = machine_facts(hardware, threads)
    limits = Limits(options.size)
    rows: list[dict[str, Any]] = []
    with folders(options.folder) as (cache, scratch):
        for case in options.cases:
            inputs = inputs_alone(case, cache, scratch / case.name, WARM_STEPS + options.rounds)
            for compute in default_computes(hardware):
                rows.append(row_of(inputs, compute, threads, options.rounds, limits))
                clock.say(f"{case.name}, {compute}: {rows[-1].get('problem', 'measured')}")
    rates = limits.rates()
    set_fractions(rows, rates)
    give_result(rows, facts, clock, options, limits_per_second=rates, matrix_size=options.size)
    if not options.json:
        print(title(facts))
        print(", ".join(f"{name} {rate / 1e9:,.0f} Gop/s" for name, rate in rates.items()), "by torch")
        print_table(COLUMNS, [row_cells(row) for row in rows])
    return 1 if any("problem" in row and not row["is_refusal"] for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
