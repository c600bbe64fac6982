"""Runs killed at random moments and gone on with: whether the adapter is that of a run that nobody disturbed.

    python benchmarks/kill_resume.py [--kills 200] [--json] [--rounds N] [--threads N] [--folder DIR]
                                     [--output FILE.json]

The bundled model learns rows of the project's documentation, with dropout and packing, and writes a checkpoint after
every second of its steps (--rounds, at least 8). Each kill is a run of its own: `fitune train` in a process that gets
SIGKILL, two out of three at a random moment between its first step and its end, every third while a checkpoint is
being written (the folder that becomes one is seen, and the kill follows after up to some milliseconds); then `fitune
train --resume`, or the same command again where no checkpoint was whole yet, to the end. `identical`: adapters with
the very bits of the undisturbed run's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import yaml
from plan_accuracy import write_text
from speed_result import Clock, add_options, check_options, folders, give_result, machine_facts, title

from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import detect

KILLS, STEPS, LEAST_STEPS = 200, 8, 8
ROW_TOKENS, SAVE_EVERY = 128, 2
SEED = 0
COLUMNS = ("killed", "runs", "went on from", "identical")
# How long after a checkpoint begins to be written the process is killed: within the time that it takes.
WRITING_SECONDS = 0.05
PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class Row:
    """One kill.

    Attributes:
        moment: "at random" or "while a checkpoint was written".
        went_on_from: the checkpoint, or "the beginning".
        was_killed: whether the process was still running when the signal came.
    """

    moment: str
    went_on_from: str
    was_killed: bool
    identical: bool
    problem: str | None = None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS, help=f"runs to kill (default {KILLS})")
    add_options(parser, STEPS, "steps of each run")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if options.kills < 1:
        parser.error("--kills: at least 1 is needed")
    if options.rounds < LEAST_STEPS:
        parser.error(f"--rounds: at least {LEAST_STEPS}, for three checkpoints before the last")
    return options


def write_run_file(folder: Path, steps: int, threads: int | None) -> Path:
    """A run with everything random on."""
    write_text(folder / "text.jsonl", 4 * steps * ROW_TOKENS)
    settings = {
        "model": "bundled", "method": "qlora",
        "data": {"train": str(folder / "text.jsonl"), "max_tokens": ROW_TOKENS, "pack": True, "validation": 0.1,
                 "over_length": "cut"},
        "lora": {"rank": 8, "dropout": 0.1},
        "train": {
            "steps": steps, "micro_batch": 1, "save_every_steps": SAVE_EVERY, "keep_checkpoints": 2,
            "neftune_alpha": 5.0, "learning_rate": 1e-3, "threads": threads,
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def train_command(run_file: Path, output: Path, resume: bool = False) -> list[str]:
    return [
        sys.executable, "-m", "fitune", "train", str(run_file), f"output={output}", "--json",
        *(["--resume"] if resume else []),
    ]  # fmt: skip


def finish(command: Sequence[str]) -> str | None:
    """Runs a command to its end; None, or what it said where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    return None if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"


def bits_of(output: Path) -> str:
    return hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def kill_one(
    run_file: Path, output: Path, wanted: str, chance: random.Random, usual_seconds: float, kind: int
) -> Row:
    """A run that is killed, and gone on with."""
    while_writing = kind % 3 == 2
    moment = "while a checkpoint was written" if while_writing else "at random"
    process = subprocess.Popen(train_command(run_file, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if while_writing:
        _wait_for(process, lambda: any((output / "checkpoints").glob(".step-*")), skip=chance.randrange(3))
        time.sleep(chance.uniform(0, WRITING_SECONDS))
    else:
        _wait_for(process, (output / "metrics.jsonl").is_file)
        time.sleep(chance.uniform(0, usual_seconds))
    was_killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = sorted(path.name for path in (output / "checkpoints").glob("step-*")) if output.is_dir() else []
    if not was_killed and (output / "summary.json").is_file():
        return Row(moment, "it had ended", False, bits_of(output) == wanted)
    problem = finish(train_command(run_file, output, resume=bool(whole)))
    identical = problem is None and bits_of(output) == wanted
    return Row(moment, whole[-1] if whole else "the beginning", was_killed, identical, problem)


def _wait_for(process: subprocess.Popen[bytes], seen: Callable[[], bool], skip: int = 0) -> None:
    """Until something is there, `skip` times gone again before, or the process has ended."""
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < PATIENCE_SECONDS:
        if seen():
            if skip == 0:
                return
            skip -= 1
            while process.poll() is None and seen():
                time.sleep(0.0005)
        time.sleep(0.0005)


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    clock = Clock()
    facts = machine_facts(hardware, options.threads or hardware.threads)
    chance = random.Random(SEED)
    rows: list[Row] = []
    with folders(options.folder) as (_, scratch):
        run_file = write_run_file(scratch, options.rounds, options.threads)
        for name in ("first", "whole"):  # the first one makes the store
            problem = finish(train_command(run_file, scratch / name))
            if problem is not None:
                raise InputError(problem, where="the undisturbed run")
        wanted = bits_of(scratch / "whole")
        if bits_of(scratch / "first") != wanted:
            raise InputError("two undisturbed runs differ", where=scratch)
        took = float(yaml.safe_load((scratch / "whole" / "summary.json").read_text())["seconds"])
        clock.say(f"undisturbed: {took:.1f} s of steps")
        for number in range(options.kills):
            output = scratch / f"killed-{number}"
            rows.append(kill_one(run_file, output, wanted, chance, took, number))
            if not rows[-1].identical:
                clock.say(f"run {number}: {rows[-1]}")
            elif (number + 1) % 10 == 0:
                clock.say(f"{number + 1} killed, {sum(row.identical for row in rows)} identical")
            shutil.rmtree(output, ignore_errors=True)
    identical = sum(row.identical for row in rows)
    killed = sum(row.was_killed for row in rows)
    give_result(
        [asdict(row) for row in rows], facts, clock, options, kills=options.kills, killed=killed, identical=identical
    )
    if not options.json:
        print(title(facts))
        found = Counter((row.moment, row.went_on_from) for row in rows)
        good = Counter((row.moment, row.went_on_from) for row in rows if row.identical)
        print_table(
            COLUMNS, [(what[0], str(count), what[1], str(good[what])) for what, count in sorted(found.items())]
        )
        print(f"{identical} of {options.kills} identical; {killed} were running when the kill came")
    return 0 if identical == options.kills else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
