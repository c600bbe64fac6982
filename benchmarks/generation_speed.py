"""Generation on the CPU: tokens a second and memory of fitune and of transformers' own `generate`.

    python benchmarks/generation_speed.py [--model NAME] [--batches 1,32] [--json] [--rounds N] [--threads N]
                                          [--folder DIR] [--output FILE.json]

The same model and prompts: pieces of 64 tokens of real text, as many as the batch holds, each continued by 64 tokens,
greedily, end tokens ignored. transformers runs in bfloat16 with its key-value cache; fitune goes the way that
`fitune evaluate` takes (but for its batches of 16), once with the same 16-bit weights and once with them in NF4, as
after a QLoRA run. Each is a fresh process that idles while the other one computes; after one continuation to warm up
they take turns. Tokens a second are new tokens by the median time of a whole call, the prompts included; memory is
the resident peak (VmHWM), loading included. Rounding differs, so that greedy continuations part at near ties: how
many tokens are the same up to there is told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

from speed_cases import MODELS
from speed_inputs import TEXT_MODEL, model_folder, text_pieces
from speed_process import Worker, WorkerFailed
from speed_result import Clock, add_options, check_options, folders, give_result, machine_facts, title, words
from speed_rounds import turns

from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import detect

ROUNDS = 5
BATCHES = (1, 32)
PROMPT_TOKENS, NEW_TOKENS = 64, 64
WEIGHTS = {"16 bits": False, "NF4": True}  # name -> whether they are quantised
COLUMNS = (
    "batch", "our weights", "tokens/s", "transformers'", "ratio", "peak GB", "transformers'", "ratio", "same tokens"
)  # fmt: skip


@dataclass
class Row:
    """One line. Ratios are ours to transformers'.

    Attributes:
        same_tokens: how many tokens of the continuations are the same before the first that is not, on average.
        problem: why there are no figures.
    """

    batch: int
    weights: str
    tokens_per_second: float | None = None
    peer_tokens_per_second: float | None = None
    speed_ratio: float | None = None
    peak_bytes: int | None = None
    peer_peak_bytes: int | None = None
    memory_ratio: float | None = None
    same_tokens: float | None = None
    seconds: list[float] = field(default_factory=list)
    peer_seconds: list[float] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default=TEXT_MODEL, help=f"default: {TEXT_MODEL}")
    parser.add_argument("--batches", type=words, default=list(map(str, BATCHES)), metavar="A,B")
    add_options(parser, ROUNDS, "timed calls of each side")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if not all(word.isdigit() and int(word) > 0 for word in options.batches):
        parser.error("--batches: numbers of prompts are needed")
    options.batches = [int(word) for word in options.batches]
    return options


def same_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two continuations share before they part."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(one))


def compare(row: Row, ours: Worker, peer: Worker, rounds: int) -> None:
    """Both in turns, ours after its first call; sets the row's figures."""
    ours.ask({"generate": True})
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for is_ours, _ in turns(rounds, rounds):
        found[is_ours].append((ours if is_ours else peer).ask({"generate": True}))
    row.seconds, row.peer_seconds = ([one["seconds"] for one in found[is_ours]] for is_ours in (True, False))
    tokens = row.batch * NEW_TOKENS
    row.tokens_per_second = tokens / statistics.median(row.seconds)
    row.peer_tokens_per_second = tokens / statistics.median(row.peer_seconds)
    row.speed_ratio = row.tokens_per_second / row.peer_tokens_per_second
    row.peak_bytes, row.peer_peak_bytes = ours.memory()[0], peer.memory()[0]
    row.memory_ratio = row.peak_bytes / row.peer_peak_bytes
    pairs = zip(found[True][0]["tokens"], found[False][0]["tokens"], strict=True)
    row.same_tokens = statistics.fmean(same_beginning(one, other) for one, other in pairs)
    row.report = {"fitune": ours.report, "transformers": peer.report}


def rows_of(batch: int, model: Path, prompts: Path, scratch: Path, threads: int, rounds: int) -> list[Row]:
    """One row for each way that our weights are held; the peer stays loaded."""
    rows = [Row(batch, name) for name in WEIGHTS]
    spec = {"model": str(model), "prompts": str(prompts), "new_tokens": NEW_TOKENS}
    try:
        peer = Worker(spec | {"side": "transformers", "threads": threads}, scratch, threads)
    except WorkerFailed as error:
        for row in rows:
            row.problem = f"transformers failed: {error}"
        return rows
    try:
        peer.ask({"generate": True})
        for row in rows:
            ours = Worker(spec | {"side": "fitune", "four_bit": WEIGHTS[row.weights]}, scratch, threads)
            try:
                compare(row, ours, peer, rounds)
            finally:
                ours.close()
    except WorkerFailed as error:
        for row in rows:
            if row.memory_ratio is None:
                row.problem = f"failed: {error}"
    finally:
        peer.close()
    return rows


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    if row.peak_bytes is None or row.peer_peak_bytes is None or row.problem is not None:
        return [str(row.batch), row.weights, *["-"] * 6, (row.problem or "").replace("\n", " ")]
    return [
        str(row.batch), row.weights, f"{row.tokens_per_second:,.0f}", f"{row.peer_tokens_per_second:,.0f}",
        f"{row.speed_ratio:.2f}", f"{row.peak_bytes / 1e9:.2f}", f"{row.peer_peak_bytes / 1e9:.2f}",
        f"{row.memory_ratio:.2f}", f"{row.same_tokens:.0f} of {NEW_TOKENS}",
    ]  # fmt: skip


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    threads = options.threads or hardware.threads
    clock = Clock()
    facts = machine_facts(hardware, threads)
    rows: list[Row] = []
    with folders(options.folder) as (cache, scratch):
        model = model_folder(MODELS[options.model], cache)
        pieces = text_pieces(model, model_folder(MODELS[TEXT_MODEL], cache), PROMPT_TOKENS)
        texts = list(islice(pieces, max(options.batches)))
        for batch in options.batches:
            prompts = scratch / f"prompts-{batch}.json"
            prompts.write_text(json.dumps(texts[:batch]))
            for row in rows_of(batch, model, prompts, scratch, threads, options.rounds):
                rows.append(row)
                clock.say("  ".join(row_cells(row)))
    counts = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    give_result([asdict(row) for row in rows], facts, clock, options, model=options.model, **counts)
    if not options.json:
        print(title(facts))
        print(f"{options.model}, {PROMPT_TOKENS} tokens continued by {NEW_TOKENS}; beside transformers in bfloat16")
        print_table(COLUMNS, [row_cells(row) for row in rows])
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
