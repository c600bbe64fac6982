"""QLoRA training on the CPU: tokens a second and memory of fitune and of transformers + PEFT + bitsandbytes.

    python benchmarks/train_speed.py [--quick] [--json] [--cases A,B] [--compute bfloat16,...] [--alpaca FILE]
                                     [--recompute] [--compile] [--peer-float32] [--rounds N] [--threads N]
                                     [--folder DIR] [--output FILE.json]

The same 16-bit weights, the same rows of tokens, LoRA of rank 16 (alpha 32) on all linear layers of the decoder
from the same first values, AdamW in float32, the same learning rate and clipping. Each side is a process of its own
that idles while another one computes: after the peer's fastest variant has been found (`speed_cases.VARIANTS`), it
and ours, one for each `train.compute`, take one step each in turns. Tokens a second are by the median step; memory
is the process's resident peak (VmHWM), loading included, and for fitune making its 4-bit store, as in a first run.
In the case `alpaca` both train on the very same samples of a file, each as it is used: fitune packs them, the peer
pads batches of four; tokens are those of the samples, without padding, and the rate is all tokens by all seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

from speed_cases import FLOAT32_VARIANTS, QUICK_CASES, VARIANTS, Variant, chosen_cases
from speed_inputs import Inputs, prepared_inputs, write_run_file
from speed_process import Worker, WorkerFailed
from speed_result import (
    Clock,
    Say,
    add_options,
    check_options,
    default_computes,
    folders,
    give_result,
    has_bfloat16,
    machine_facts,
    title,
    words,
)
from speed_rounds import (
    Method,
    NoPeer,
    PeerSide,
    Recompute,
    Row,
    compare,
    fastest_peer,
    problem_of,
    start_ours,
    start_peer,
)

from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import detect

ROUNDS = 5
PEER_PACKAGES = ("bitsandbytes", "accelerate")
COLUMNS = ("case", "compute", "tokens/s", "peer's", "ratio", "peak GB", "peer's", "ratio", "peer's variant")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK_CASES)}, shorter trials")
    parser.add_argument("--cases", type=words, default=[], metavar="A,B", help="default: all that can be measured")
    parser.add_argument(
        "--compute", type=words, default=[], metavar="A,B",
        help="train.compute of our side (default: the best 16- or 32-bit format here, and int8 if there is one)",
    )  # fmt: skip
    parser.add_argument("--alpaca", type=Path, metavar="FILE", help="a JSON list of instructions, for case alpaca")
    parser.add_argument("--recompute", action="store_true", help="add rows of full recomputation on both sides")
    parser.add_argument(
        "--peer-float32", action="store_true", help="the peer in float32 (always so without bfloat16 instructions)"
    )
    parser.add_argument("--compile", action="store_true", help="add rows of the peer under torch.compile")
    add_options(parser, ROUNDS, "timed steps of each side")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if options.alpaca is not None and not options.alpaca.is_file():
        parser.error(f"--alpaca: no file {options.alpaca}")
    names = options.cases or (list(QUICK_CASES) if options.quick else [])
    try:
        options.cases = chosen_cases(names, options.alpaca is not None)
    except ValueError as error:
        parser.error(f"--cases: {error}")
    return options


def our_rows(
    inputs: Inputs, peer: PeerSide, method: Method, computes: Sequence[str], recompute: Recompute
) -> list[Row]:
    """A row for each `train.compute`: our sides started, compared with a peer that is loaded already, and closed."""
    sides: dict[str, Worker] = {}
    rows: dict[str, Row] = {}
    try:
        for compute in computes:
            run_file = inputs.scratch / f"run-{compute}.yaml"
            write_run_file(
                inputs.case, inputs.model, inputs.data, run_file,
                compute=compute, recompute=recompute, threads=method.threads,
            )  # fmt: skip
            try:
                sides[compute] = start_ours(inputs, run_file, method.threads)
            except WorkerFailed as error:
                name = peer.variant.name
                rows[compute] = Row(
                    inputs.case.name, compute, recompute, peer_variant=name, problem=problem_of(error)
                )
        rows |= {row.compute: row for row in compare(inputs, sides, peer, method, recompute)}
    finally:
        for side in sides.values():
            side.close()
    return [rows[compute] for compute in computes]


def rows_of(
    inputs: Inputs, computes: Sequence[str], options: argparse.Namespace, method: Method, say: Say
) -> Iterator[Row]:
    """All rows of one case."""
    best: Variant | None = None
    for recompute, variants in _groups(options):
        try:
            peer = fastest_peer(inputs, variants, method, say)
        except (NoPeer, WorkerFailed) as error:
            yield from (Row(inputs.case.name, compute, recompute, problem=str(error)) for compute in computes)
            continue
        best = best or peer.variant
        try:
            yield from our_rows(inputs, peer, method, computes, recompute)
        finally:
            peer.worker.close()
    if options.compile and best is not None:
        yield from _compiled_rows(inputs, best, computes, method, say)


def _groups(options: argparse.Namespace) -> Iterator[tuple[Recompute, list[Variant]]]:
    """What is compared with what: the fastest with the fastest, recomputation with checkpointing."""
    # Checkpointing computes the same and more; a quick look can do without having seen that.
    variants = FLOAT32_VARIANTS if options.peer_float32 else VARIANTS
    yield "none", [variant for variant in variants if not (options.quick and variant.checkpointing)]
    if options.recompute:
        yield "layers", [variant for variant in variants if variant.checkpointing]


def _compiled_rows(
    inputs: Inputs, best: Variant, computes: Sequence[str], method: Method, say: Say
) -> Iterator[Row]:  # fmt: skip
    variant = replace(best, compiled=True)
    try:
        worker = start_peer(inputs, variant, method)
    except WorkerFailed as error:
        yield Row(inputs.case.name, computes[0], peer_variant=variant.name, problem=f"the peer failed: {error}")
        return
    try:
        for _ in range(method.warm_steps + 1):
            worker.step()
        say(f"{inputs.case.name}: {variant.name}: {sum(worker.seconds):.0f} s to warm up")
        peer = PeerSide(variant, worker, len(worker.losses), [])
        yield from our_rows(inputs, peer, method, computes, "none")
    except WorkerFailed as error:
        yield Row(inputs.case.name, computes[0], peer_variant=variant.name, problem=f"the peer failed: {error}")
    finally:
        worker.close()


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    compute = row.compute if row.recompute == "none" else f"{row.compute}, recompute"
    if row.problem is not None or row.peak_bytes is None or row.peer_peak_bytes is None:
        return [row.case, compute, *["-"] * 6, (row.problem or "").replace("\n", " ")]
    variant = row.peer_variant or ""
    if "torch.compile" in variant:
        variant += f" (warm-up {row.peer_warm_up_seconds:.0f} s)"
    return [
        row.case, compute, f"{row.tokens_per_second:,.0f}", f"{row.peer_tokens_per_second:,.0f}",
        f"{row.speed_ratio:.2f}", f"{row.peak_bytes / 1e9:.2f}", f"{row.peer_peak_bytes / 1e9:.2f}",
        f"{row.memory_ratio:.2f}", variant,
    ]  # fmt: skip


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    options.peer_float32 |= not has_bfloat16(hardware)
    method = Method(
        options.rounds, warm_steps=1, trial_steps=1 if options.quick else 2,
        threads=options.threads or hardware.threads, is_quick=options.quick,
    )  # fmt: skip
    computes = options.compute or default_computes(hardware)
    clock = Clock()
    facts = machine_facts(hardware, method.threads, PEER_PACKAGES)
    rows: list[Row] = []
    with folders(options.folder) as (cache, scratch):
        for case in options.cases:
            inputs = prepared_inputs(case, cache, scratch / case.name, options.alpaca, options.rounds)
            for row in rows_of(inputs, computes, options, method, clock.say):
                rows.append(row)
                clock.say("  ".join(row_cells(row)))
    give_result([row.as_json() for row in rows], facts, clock, options)
    if not options.json:
        print(title(facts))
        print_table(COLUMNS, [row_cells(row) for row in rows])
    return 1 if any(row.problem and not row.problem.startswith("fitune refuses") for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
