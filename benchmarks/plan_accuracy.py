"""What `fitune plan` says beside what `fitune train` then takes: peak memory and seconds a step.

    python benchmarks/plan_accuracy.py [--quick] [--cases NAME,...] [--json] [--rounds N] [--threads N]
                                       [--folder DIR] [--output FILE.json]

Each case is a run file on real text (the project's documentation, packed), planned by one fresh process of the
command and trained by another: a few steps, to the end, the adapter saved. What is measured is the resident peak
(VmHWM) that the run's summary tells, and the median of the steps after the first. Stores are kept between cases, as
between runs.

A time can be foretold only on a machine that stays as it is. Its rate (of a fixed product of matrices) is taken
before the plan, between plan and run, and after the run; where it moved by more than STEADY the case is planned and
trained again, whatever came out, TRIES times at most. `drift` in the result is how far it moved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import yaml
from speed_cases import MODELS, RANK, SEED, Model
from speed_inputs import TEXT_MODEL, model_folder, project_text
from speed_result import Clock, add_options, check_options, folders, give_result, machine_facts, title, words

from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import detect
from fitune.models.find import find_model

ROUNDS, WARM_STEPS = 5, 1
STEADY, TRIES = 0.10, 2
RATE_ROWS, RATE_ROUNDS = 1536, 15
PARAGRAPH_WORDS = 60
COLUMNS = ("case", "planned GB", "measured GB", "ratio", "planned s", "measured s", "ratio", "drift")
LARGE = "llama-1.1b-text"  # the 1.1B shape with SmolLM2's tokenizer and so many rows of embeddings


@dataclass(frozen=True)
class Case:
    """A run: what is trained, how, and on rows of which size."""

    model: str
    method: str
    rows: int
    row_tokens: int
    compute: str = "bfloat16"
    recompute: str = "none"
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        parts = [self.model, self.method, f"{self.rows}x{self.row_tokens}", self.compute]
        parts += ["recompute"] if self.recompute != "none" else []
        parts += [self.optimizer] if self.optimizer != "adamw" else []
        return " ".join(parts)


def _cases() -> Iterator[Case]:
    """Two sizes, three methods, lengths, micro-batches, recomputation, computations."""
    small, large = TEXT_MODEL, LARGE
    for method, (rows, tokens), recompute in itertools.product(
        ("qlora", "lora"), ((1, 512), (4, 512), (1, 2048)), ("none", "layers")
    ):
        yield Case(small, method, rows, tokens, recompute=recompute)
    yield Case(small, "qlora", 4, 512, compute="int8")
    yield Case(small, "qlora", 1, 2048, compute="int8", recompute="layers")
    yield Case(small, "full", 1, 512)
    yield Case(small, "full", 4, 512)
    yield Case(small, "full", 1, 2048, recompute="layers")
    yield Case(small, "full", 1, 512, optimizer="adamw8bit")
    for method in ("qlora", "lora"):
        yield Case(large, method, 1, 512)
        yield Case(large, method, 1, 1024, recompute="layers")
    yield Case(large, "qlora", 2, 512)
    yield Case(large, "qlora", 2, 512, compute="int8")
    yield Case(large, "full", 1, 512, optimizer="adamw8bit")


CASES = {case.name: case for case in _cases()}
QUICK_CASES = (
    Case(TEXT_MODEL, "qlora", 4, 512).name,
    Case(TEXT_MODEL, "lora", 1, 2048, recompute="layers").name,
    Case(TEXT_MODEL, "full", 1, 512).name,
    Case(LARGE, "qlora", 1, 512).name,
)


@dataclass(frozen=True)
class Row:
    """A case's figures; `problem` says why there are none."""

    case: str
    predicted_bytes: int = 0
    measured_bytes: int = 0
    predicted_seconds: float = 0.0
    measured_seconds: float = 0.0
    problem: str | None = None
    drift: float = 0.0

    @property
    def bytes_ratio(self) -> float:
        return self.predicted_bytes / self.measured_bytes

    @property
    def seconds_ratio(self) -> float:
        return self.predicted_seconds / self.measured_seconds


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four of the cases")
    parser.add_argument("--cases", type=words, default=[], metavar="A,B", help="default: all; names as in the table")
    add_options(parser, ROUNDS, "timed steps")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"--cases: no case called {', '.join(unknown)} (there are {', '.join(CASES)})")
    options.cases = [CASES[name] for name in options.cases or (QUICK_CASES if options.quick else CASES)]
    return options


def checkpoint(model: str, cache: Path) -> Path:
    """The folder of 16-bit weights and a tokenizer of a case's model."""
    if model != LARGE:
        return model_folder(MODELS[model], cache)
    bundled, shape = find_model("bundled"), MODELS["llama-1.1b"].shape
    assert shape is not None
    vocabulary = int(bundled.config.vocab_size)
    folder = model_folder(Model(LARGE, {**shape, "vocab_size": vocabulary}, MODELS["llama-1.1b"].origin), cache)
    if not (folder / "tokenizer.json").is_file():
        bundled.tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, tokens: int) -> None:
    """The project's documentation in paragraphs, from its start again until there is enough of it."""
    found = project_text().split()
    paragraphs = [found[start : start + PARAGRAPH_WORDS] for start in range(0, len(found), PARAGRAPH_WORDS)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(2 + tokens // PARAGRAPH_WORDS):  # a word has a token or more
            text = f"{number}. " + " ".join(paragraphs[number % len(paragraphs)])
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def settings_of(case: Case, model: Path, data: Path, steps: int, threads: int | None) -> dict[str, Any]:
    """The run file, as a user would write it."""
    train = {
        "micro_batch": case.rows, "steps": steps, "compute": case.compute, "recompute": case.recompute,
        "optimizer": case.optimizer, **({"threads": threads} if threads else {}),
    }  # fmt: skip
    return {
        "model": str(model),
        "method": case.method,
        "seed": SEED,
        "data": {"train": str(data), "max_tokens": case.row_tokens, "over_length": "drop"},
        **({"lora": {"rank": RANK}} if case.method != "full" else {}),
        "train": train,
    }


def machine_rate(threads: int | None) -> float:
    """Multiplications a second in a product of matrices [RATE_ROWS, RATE_ROWS] of float32: the median of some."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or detect(with_accelerators=False).threads)
    a, times = torch.ones(RATE_ROWS, RATE_ROWS), []
    for _ in range(RATE_ROUNDS):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return RATE_ROWS**3 / statistics.median(times)


def steadily_measured(case: Case, cache: Path, scratch: Path, rounds: int, threads: int | None) -> Row:
    """As `measured`, again while the machine's own rate moved."""
    for attempt in range(TRIES):
        row = measured(case, cache, scratch, rounds, threads, attempt)
        if row.drift <= STEADY:
            break
    return row


def measured(
    case: Case, cache: Path, scratch: Path, rounds: int, threads: int | None, attempt: int = 0
) -> Row:  # fmt: skip
    """Plans and trains a case. Raises RuntimeError with the command's own words where either fails."""
    folder = scratch / f"{case.name.replace(' ', '-')}-{attempt}"
    folder.mkdir()
    steps = WARM_STEPS + rounds
    write_text(folder / "text.jsonl", 2 * steps * case.rows * case.row_tokens)
    settings = settings_of(case, checkpoint(case.model, cache), folder / "text.jsonl", steps, threads)
    run_file, run = folder / "run.yaml", folder / "run"
    run_file.write_text(yaml.safe_dump(settings, sort_keys=False))
    environment = {**os.environ, "FITUNE_CACHE": str(scratch / "stores"), "HF_HUB_OFFLINE": "1"}
    rates = [machine_rate(threads)]
    plan = json.loads(command(["plan", str(run_file), "--json"], environment))
    rates.append(machine_rate(threads))
    command(["train", str(run_file), f"output={run}", "--json"], environment)
    rates.append(machine_rate(threads))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [line["seconds"] for line in lines if "loss" in line]
    seconds = statistics.median(end - start for start, end in itertools.pairwise(ends))
    drift = max(rates) / min(rates) - 1
    return Row(
        case.name, plan["peak_bytes"], summary["peak_bytes"], plan["seconds_per_step"], seconds, drift=drift
    )  # fmt: skip


def command(arguments: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fitune", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"fitune {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    if row.problem is not None:
        return [row.case, *["-"] * 6, row.problem.replace("\n", " ")]
    return [
        row.case, f"{row.predicted_bytes / 1e9:.2f}", f"{row.measured_bytes / 1e9:.2f}", f"{row.bytes_ratio:.2f}",
        f"{row.predicted_seconds:.2f}", f"{row.measured_seconds:.2f}", f"{row.seconds_ratio:.2f}",
        f"{row.drift:.0%}",
    ]  # fmt: skip


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    clock = Clock()
    facts = machine_facts(hardware, options.threads or hardware.threads)
    rows: list[Row] = []
    with folders(options.folder) as (cache, scratch):
        for case in options.cases:
            try:
                row = steadily_measured(case, cache, scratch, options.rounds, options.threads)
            except RuntimeError as error:
                row = Row(case.name, problem=str(error))
            rows.append(row)
            clock.say("  ".join(row_cells(row)))
    give_result([asdict(row) for row in rows], facts, clock, options)
    if not options.json:
        print(title(facts))
        print_table(COLUMNS, [row_cells(row) for row in rows])
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
