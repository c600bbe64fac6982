"""What the benchmarks of speed share on their way in and out: options, folders, the machine, the result."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from fitune.atomic import write_text
from fitune.config.schema import TrainSettings
from fitune.errors import InputError
from fitune.hardware import Hardware
from fitune.kernels import native
from fitune.plan.computation import BFLOAT16_SETS
from fitune.train.run import machine

Say = Callable[[str], None]


def words(text: str) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def add_options(parser: argparse.ArgumentParser, rounds: int, rounds_are: str) -> None:
    """The options that all have; `rounds_are` says of what."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"{rounds_are} (default {rounds})")
    parser.add_argument("--threads", type=int, default=None, help="default: what affinity and container allow")
    parser.add_argument("--folder", type=Path, default=None, help="for checkpoints (default: the system's temporary)")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="write the JSON object there too")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with a usage message where those options cannot be used."""
    if options.rounds < 1:
        parser.error("--rounds: at least 1 is needed")
    if options.threads is not None and options.threads < 1:
        parser.error("--threads: at least 1 is needed")


def has_bfloat16(hardware: Hardware) -> bool:
    """Whether the processor computes in bfloat16."""
    return bool(BFLOAT16_SETS & hardware.instruction_sets)


def default_computes(hardware: Hardware) -> list[str]:
    """What `auto` means here, and int8 where fitune knows it."""
    known = get_args(TrainSettings.model_fields["compute"].annotation)
    best = "bfloat16" if has_bfloat16(hardware) else "float32"
    return [best, *(name for name in known if name == "int8")]


def machine_facts(hardware: Hardware, threads: int, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Processor, memory, versions (of these packages too), and how busy the machine was before."""
    facts = machine(hardware)
    for name in packages:
        try:
            facts["packages"][name] = version(name)
        except PackageNotFoundError as error:
            raise InputError(f"the peer needs {name}; run: pip install {name}") from error
    kernels = native.status()
    return facts | {
        "cpu": facts["processor"],
        "threads": threads,
        "available_bytes": hardware.available_bytes,
        "kernels": kernels.instruction_set or kernels.reason,
        "load_average": os.getloadavg()[0],
    }


def title(facts: dict[str, Any]) -> str:
    """The line above a table."""
    return f"{facts['cpu']}, {facts['threads']} threads, kernels: {facts['kernels']}"


@contextmanager
def folders(folder: Path | None) -> Iterator[tuple[Path, Path]]:
    """A folder for checkpoints, which are kept, and one for all else, which is removed, by SIGTERM too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cache = (folder or Path(tempfile.gettempdir()) / "fitune-train-speed").absolute()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache) as scratch:
        yield cache, Path(scratch)


class Clock:
    """Seconds since the benchmark began, and lines on stderr that tell them."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def say(self, line: str) -> None:
        print(f"[{self.seconds():4.0f} s] {line}", file=sys.stderr, flush=True)

    def seconds(self) -> float:
        return time.perf_counter() - self._begun


def give_result(
    rows: Sequence[dict[str, Any]], facts: dict[str, Any], clock: Clock, options: argparse.Namespace, **more: Any
) -> None:
    """Writes the JSON object to --output and, with --json, prints it."""
    result = {
        "rows": list(rows),
        **more,
        "machine": facts,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "seconds": clock.seconds(),
    }
    if options.output is not None:
        write_text(options.output, json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))
