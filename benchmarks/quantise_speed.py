"""NF4 with double quantisation: weights a second of bitsandbytes and of fitune, on the CPU, on the same weights.

    python benchmarks/quantise_speed.py [--json] [--threads N] [--repeats N] [--peer-repeats N]

Both get the same bfloat16 matrices and give codes, 8-bit block maxima, their scales and the offset; the two take
turns. In the same run every bit of the two is compared, with one thread, because the offset is a mean whose last
bit depends on the number of threads. Medians (and minimums, the better figure on a machine that is not quiet).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from fitune.hardware import detect
from fitune.kernels import native
from fitune.quant.nf4 import quantise

SHAPES = [(4096, 4096), (11008, 4096), (576, 1536)]  # of Llama 2 7B (attention, MLP) and of SmolLM2 135M (MLP)


def theirs(weight: Tensor) -> Any:
    return quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def seconds(work: Callable[[], object], calls: int) -> float:
    """Of one call, the mean over `calls` in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def same_bits(weight: Tensor, backend: str) -> bool:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    codes, state = theirs(weight)
    ours = quantise(weight, backend)
    torch.set_num_threads(before)
    return (
        torch.equal(ours.codes, codes)
        and torch.equal(ours.absmax, state.absmax)
        and torch.equal(ours.nested_absmax, state.state2.absmax)
        and torch.equal(torch.tensor(ours.offset, dtype=torch.float32), state.offset.float())
    )


def compare(shape: tuple[int, int], backend: str, repeats: int, peer_repeats: int) -> dict[str, Any]:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05).to(torch.bfloat16)
    n = weight.numel()
    same = same_bits(weight, backend)  # warms both up, too
    calls = max(1, 8_000_000 // n)  # a small matrix is timed over several calls
    our_seconds: list[float] = []
    their_seconds: list[float] = []
    for turn in range(max(repeats, peer_repeats)):
        if turn < peer_repeats:
            their_seconds.append(seconds(lambda: theirs(weight), 1))
        if turn < repeats:
            our_seconds.append(seconds(lambda: quantise(weight, backend), calls))

    def rates(found: list[float]) -> dict[str, float]:
        return {"median": n / statistics.median(found), "best": n / min(found)}

    ours, peer = rates(our_seconds), rates(their_seconds)
    return {
        "shape": list(shape),
        "fitune_weights_per_second": ours,
        "bitsandbytes_weights_per_second": peer,
        "ratio": {kind: ours[kind] / peer[kind] for kind in ours},
        "same_bits": same,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for both (default: torch's)")
    parser.add_argument("--repeats", type=int, default=15, help="timings of fitune (default 15)")
    parser.add_argument("--peer-repeats", type=int, default=5, help="timings of bitsandbytes (default 5)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    state = native.status()
    backend = "native" if state.available else "reference"
    rows = [compare(shape, backend, options.repeats, options.peer_repeats) for shape in SHAPES]
    result = {
        "cpu": detect(with_accelerators=False).cpu_model,
        "threads": options.threads,
        "backend": backend,
        "instruction_set": state.instruction_set,
        "versions": {"torch": torch.__version__, "bitsandbytes": version("bitsandbytes")},
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{result['cpu']}, {options.threads} threads, {backend} ({state.instruction_set or state.reason})")
        print("million weights a second, medians")
        print(f"{'weights':>14} {'bitsandbytes':>14} {'fitune':>14} {'ratio':>7}   bits")
        for row in rows:
            peer, ours = row["bitsandbytes_weights_per_second"], row["fitune_weights_per_second"]
            shape = "x".join(map(str, row["shape"]))
            print(
                f"{shape:>14} {peer['median'] / 1e6:>14,.0f} {ours['median'] / 1e6:>14,.0f} "
                f"{row['ratio']['median']:>7.1f}   {'the same' if row['same_bits'] else 'DIFFERENT'}"
            )
    return 0 if all(row["same_bits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
