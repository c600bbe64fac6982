"""Methods against sizes of memory: the longest row that fits, or what is missing.

Every run in it has one row a micro-batch and computes its layers again in the backward pass, which is the least that
a method takes. Bytes are dry-run at a few lengths and drawn straight between them and beyond. A step's memory is the
largest of several sums that are straight in the length: between two lengths the line is never too low, and beyond the
last one it is right where activations already outweigh the trained weights' gradients. Where they do not, or
attention builds masks (which grow with the square), longer rows are dry-run too, as far as they fit anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from fitune.config.schema import RunConfig
from fitune.fuse.attention import obstacle
from fitune.models.graph import build_graph
from fitune.models.positions import positions_of
from fitune.plan.anatomy import read_anatomy
from fitune.plan.elsewhere import peak_on
from fitune.plan.machines import Machine, find_machine
from fitune.plan.planner import Workload

GPU_SIZES = ("8GB", "12GB", "16GB", "24GB", "48GB", "80GB")
CPU_SIZES = ("16GB", "32GB", "64GB")
METHODS = (("qlora", "adamw"), ("lora", "adamw"), ("full", "adamw8bit"), ("full", "adamw"))
SHORTEST_TOKENS = 256
DRY_RUN_TOKENS = (256, 2048, 8192)
STRIDE = 4  # from one length to the next where more are needed
# Where a configuration does not say how long a row may be.
LIMIT_TOKENS = 32768
TRAINED_SHARE = 0.5


@dataclass(frozen=True)
class Cell:
    """One method in one size of memory.

    Attributes:
        longest_tokens: of a row that fits; 0 where the shortest does not.
        missing_bytes: for the shortest row; 0 where it fits.
    """

    method: str
    optimizer: str
    kind: str
    memory_bytes: int
    longest_tokens: int
    missing_bytes: int


@dataclass(frozen=True)
class FitTable:
    """What fits where.

    Attributes:
        lengths: rows that were tried, tokens.
        dry_run_tokens: lengths that were dry-run; not all for a method that fits nowhere.
        recompute: "layers", or "none" for a model that cannot compute its layers again.
        cells: by method, GPUs before CPUs, each by size.
    """

    model: str
    lengths: tuple[int, ...]
    dry_run_tokens: tuple[int, ...]
    recompute: str
    rank: int
    cells: tuple[Cell, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def fit_table(run: RunConfig, model: str, config: PretrainedConfig) -> FitTable:
    """Fills the table for a model, with the adapter's settings of `run`. Some ten to twenty dry runs, a second each.

    Raises FituneError for a model whose step cannot be dry-run.
    """
    lengths = row_lengths(config)
    graph = build_graph(config, torch.bfloat16)
    recompute = "layers" if graph.supports_gradient_checkpointing else "none"
    masks = obstacle(graph) is not None
    dry_run_tokens: set[int] = set()
    cells: list[Cell] = []
    for method, optimizer in METHODS:
        small = _changed(run, method, optimizer, recompute)
        trained = read_anatomy(small, config, torch.bfloat16).trained_bytes
        for sizes in (GPU_SIZES, CPU_SIZES):
            machines = [_machine(size, sizes is CPU_SIZES) for size in sizes]
            dry_run = partial(_peak, machines[0], small, config)
            peaks = peaks_needed(dry_run, machines[-1].memory_bytes, lengths[-1], trained, masks)
            cells += [_cell(method, optimizer, machine, peaks, lengths) for machine in machines]
            dry_run_tokens |= peaks.keys()
    return FitTable(model, lengths, tuple(sorted(dry_run_tokens)), recompute, run.lora.rank, tuple(cells))


def peaks_needed(
    dry_run: Callable[[int], int], largest_bytes: int, longest_tokens: int, trained_bytes: int, masks: bool
) -> dict[int, int]:
    """Tokens -> peak bytes, at as many lengths as lines through them are right.

    Args:
        dry_run: the peak of a row of so many tokens.
        largest_bytes: the most memory of the table; what is above it needs no more lengths.
        trained_bytes: of the trained weights in float32, which their gradients take too.
        masks: whether attention builds them.
    """
    peaks: dict[int, int] = {}
    for tokens in dict.fromkeys(min(tokens, longest_tokens) for tokens in DRY_RUN_TOKENS):
        if not peaks or max(peaks.values()) <= largest_bytes:
            peaks[tokens] = dry_run(tokens)
    while longest_tokens > max(peaks) and max(peaks.values()) <= largest_bytes:
        last, before = sorted(peaks, reverse=True)[:2]
        by_activations = (peaks[last] - peaks[before]) / (last - before) * last
        if by_activations >= trained_bytes and not masks:
            break
        tokens = min(longest_tokens, STRIDE * last)
        peaks[tokens] = dry_run(tokens)
    return peaks


def row_lengths(config: PretrainedConfig) -> tuple[int, ...]:
    """256, 512, ... up to the longest row that the model takes, which comes last."""
    limit = positions_of(config) or LIMIT_TOKENS
    lengths = []
    tokens = SHORTEST_TOKENS
    while tokens < limit:
        lengths.append(tokens)
        tokens *= 2
    return (*lengths, limit)


def bytes_at(tokens: int, peaks: dict[int, int]) -> int:
    """Peak bytes of a row of `tokens`, on straight lines through the lengths in `peaks`."""
    known = sorted(peaks)
    if len(known) == 1:
        return peaks[known[0]]
    place = next((i for i, upper in enumerate(known[1:], 1) if tokens <= upper), len(known) - 1)
    lower, upper = known[place - 1], known[place]
    slope = (peaks[upper] - peaks[lower]) / (upper - lower)
    return round(peaks[lower] + slope * (tokens - lower))


def _cell(method: str, optimizer: str, machine: Machine, peaks: dict[int, int], lengths: Sequence[int]) -> Cell:
    fitting = [tokens for tokens in lengths if bytes_at(tokens, peaks) <= machine.memory_bytes]
    missing = max(0, bytes_at(lengths[0], peaks) - machine.memory_bytes)
    return Cell(method, optimizer, machine.kind, machine.memory_bytes, max(fitting, default=0), missing)


def _machine(size: str, is_cpu: bool) -> Machine:
    return find_machine(f"cpu:{size}", None, 1) if is_cpu else find_machine(None, size, 1)


def _peak(machine: Machine, run: RunConfig, config: PretrainedConfig, tokens: int) -> int:
    return peak_on(machine, run, config, Workload(0, 0, tokens, TRAINED_SHARE, tokens))


def _changed(run: RunConfig, method: str, optimizer: str, recompute: str) -> RunConfig:
    train = run.train.model_copy(
        update={"micro_batch": 1, "accumulation": 1, "optimizer": optimizer, "recompute": recompute}
    )
    return run.model_copy(update={"method": method, "train": train})
