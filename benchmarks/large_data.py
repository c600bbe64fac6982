"""A file of training data larger than memory: peak memory and time of its way to tokens, again, and to rows.

    python benchmarks/large_data.py [--gigabytes 5] [--records FILE.json] [--max-tokens 512] [--kinds A,B]
                                    [--json] [--threads N] [--folder DIR] [--output FILE.json]

A JSON Lines file of that size is written: the records of FILE (a list in alpaca's form, or lines of {"text": ...})
again and again, each with another number before it, so that no two are equal; without FILE, paragraphs of the
project's documentation as instructions. Instructions longer than a row are cut, texts go on in another.
Then, each in a fresh process with an empty cache at first: `fitune data inspect` (`inspect`), the same again with the
tokens of the first time (`again`), and one epoch of packed rows laid out from them, as a run counts its steps
(`rows`). Memory is the sum over the process and those it starts, looked at often: `peak_bytes` counts pages that they
share once (proportional set size), `resident_bytes` is the largest resident set of one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from speed_inputs import project_text
from speed_result import Clock, add_options, check_options, folders, give_result, machine_facts, title, words

from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import PROC, detect

KINDS = ("inspect", "again", "rows")
COLUMNS = ("what", "samples", "tokens", "peak GB", "largest process GB", "minutes", "MB/s")
LOOK_SECONDS = 0.5
SHORTEST_PARAGRAPH = 200


@dataclass(frozen=True)
class Row:
    """One way through the file. `fill_share`: of packed rows, how full they are; 0 where none were made."""

    kind: str
    file_bytes: int
    samples: int
    tokens: int
    peak_bytes: int
    resident_bytes: int
    seconds: float
    fill_share: float = 0.0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the file, 1e9 bytes each (default 5)")
    parser.add_argument("--records", type=Path, default=None, metavar="FILE", help="a JSON list in alpaca's form")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a row; longer samples are cut (default 512)")
    parser.add_argument("--kinds", type=words, default=list(KINDS), metavar="A,B", help=f"of {', '.join(KINDS)}")
    add_options(parser, 1, "not used")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if set(options.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(KINDS)} are known")
    if options.gigabytes <= 0:
        parser.error("--gigabytes: must be more than 0")
    return options


def records_of(path: Path | None) -> list[dict[str, str]]:
    """Records in alpaca's form."""
    if path is not None:
        text = path.read_text(encoding="utf-8")
        found: list[dict[str, str]] = (
            [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        )
        return found
    paragraphs = [part for part in project_text().split("\n\n") if len(part) >= SHORTEST_PARAGRAPH]
    return [{"instruction": part[:60], "input": "", "output": part[60:]} for part in paragraphs]


def write_file(path: Path, records: Sequence[dict[str, str]], size: int) -> None:
    """The records again and again, each other than all before, until the file has `size` bytes."""
    name = begins_with(records)
    with open(path, "w", encoding="utf-8", buffering=1 << 20) as file:
        written = 0
        for number, record in enumerate(cycle(records)):
            if written >= size:
                return
            line = json.dumps({**record, name: f"[{number}] {record[name]}"}) + "\n"
            written += len(line)  # json.dumps writes ASCII
            file.write(line)


def begins_with(records: Sequence[dict[str, str]]) -> str:
    """The key that a record's number is put before."""
    return "text" if "text" in records[0] else "instruction"


def measured(command: Sequence[str], cache: Path, threads: int | None) -> tuple[dict[str, Any], int, int, float]:
    """A command's JSON answer, the peaks of all its processes together and of the largest, and its seconds."""
    environment = os.environ | {"FITUNE_CACHE": str(cache)} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        peak = largest = 0
        while True:
            sizes = [memory_of(pid) for pid in family_of(process.pid)]
            peak = max(peak, sum(shared for shared, _ in sizes))
            largest = max([largest, *(resident for _, resident in sizes)])
            try:
                answer, _ = process.communicate(timeout=LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise InputError(f"{' '.join(command)} ended with code {process.returncode}")
    return json.loads(answer), peak, largest, seconds


def family_of(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    yield pid
    try:
        for task in (PROC / str(pid) / "task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family_of(int(child))
    except OSError:
        return


def memory_of(pid: int) -> tuple[int, int]:
    """A process's proportional and whole resident set, in bytes; nothing once it has ended."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name.rstrip(":"): 1024 * int(value) for name, value in (line.split()[:2] for line in lines)}
    return sizes.get("Pss", 0), sizes.get("Rss", 0)


def lay_out(file: Path, max_tokens: int, over_length: str) -> dict[str, Any]:
    """One epoch of rows of the file's samples, counted and thrown away."""
    from fitune.config.schema import RunConfig
    from fitune.data.dataset import load_training_data
    from fitune.data.order import epoch_rows
    from fitune.models.find import find_model

    settings = {"train": str(file), "max_tokens": max_tokens, "over_length": over_length}
    config = RunConfig.model_validate({"model": "bundled", "data": settings})
    samples = load_training_data(config.data, find_model("bundled").tokenizer(), config.seed).train
    rows = taken = seen = 0
    for row in epoch_rows(samples, max_tokens, 1, config.seed, 0, pack=True):
        rows += 1
        seen += len(row.samples)
        group = -1
        for number, (own, common) in zip(row.samples, row.shared, strict=True):
            taken += int(samples.lengths[number]) - (common if own >= 0 and own == group else 0)
            group = own
    assert seen == len(samples)
    return {
        "samples": len(samples),
        "tokens": int(samples.lengths.sum(dtype="int64")),
        "fill_share": taken / (rows * max_tokens),
    }


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    what = f"rows, {row.fill_share:.1%} full" if row.fill_share else row.kind
    return [
        what, f"{row.samples:,}", f"{row.tokens:,}", f"{row.peak_bytes / 1e9:.2f}", f"{row.resident_bytes / 1e9:.2f}",
        f"{row.seconds / 60:.1f}", f"{row.file_bytes / row.seconds / 1e6:.1f}",
    ]  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["--lay-out"]:
        print(json.dumps(lay_out(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
        return 0
    options = parse()
    hardware = detect(with_accelerators=False)
    facts = machine_facts(hardware, options.threads or hardware.threads)
    rows: list[Row] = []
    with folders(options.folder) as (_, scratch):
        file = scratch / "data.jsonl"
        records = records_of(options.records)
        over_length = "split" if begins_with(records) == "text" else "cut"
        write_file(file, records, round(options.gigabytes * 1e9))
        size = file.stat().st_size
        clock = Clock()
        clock.say(f"{size / 1e9:.2f} GB written")
        shown = ["data", "inspect", str(file), "--json", "--no-time", "--over-length", over_length]
        inspect = [sys.executable, "-m", "fitune", *shown, "--max-tokens", str(options.max_tokens)]
        worker = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--lay-out",
            str(file),
            str(options.max_tokens),
            over_length,
        ]
        for kind in options.kinds:
            command = worker if kind == "rows" else inspect
            answer, peak, largest, seconds = measured(command, scratch / "cache", options.threads)
            counts = (int(answer["samples"]), int(answer["tokens"]))
            rows.append(Row(kind, size, *counts, peak, largest, seconds, answer.get("fill_share", 0.0)))
            clock.say("  ".join(row_cells(rows[-1])))
        kept = sum(part.stat().st_size for part in (scratch / "cache").rglob("*.bin"))
    give_result([asdict(row) for row in rows], facts, clock, options, kept_bytes=kept)
    if not options.json:
        print(title(facts))
        print(f"{size / 1e9:.2f} GB of JSON Lines, {kept / 1e9:.2f} GB of tokens kept")
        print_table(COLUMNS, [row_cells(row) for row in rows])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
