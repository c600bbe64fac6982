"""Choosing the settings of a run so that it stays within a memory budget: the quickest variant that does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from transformers import PretrainedConfig

from fitune.config.byte_size import parse_bytes
from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.hardware import Hardware
from fitune.plan.computation import Computation
from fitune.plan.levers import Choice, Variant, variants
from fitune.plan.planner import RUN_BYTES, Plan, RunMemory, Workload, make_plan, run_memory, shape_of
from fitune.process_memory import resident_bytes

# How far a measured peak may lie above the planned one (docs/plan.md).
MARGIN = 1.05
# A container's limit counts a little that is not this process's: so much of a budget may be missing when it begins.
FORGIVEN = 0.05
# A container's limit is a number of whole pages, just under the number that was asked for.
ROUNDED = 1.001


def plan_within(
    run: RunConfig, model: str, config: PretrainedConfig, computation: Computation, hardware: Hardware,
    workload_of: Callable[[RunConfig], Workload], rate_of: Callable[[RunConfig], float], with_time: bool = True,
) -> tuple[RunConfig, Plan]:  # fmt: skip
    """The run with its settings chosen to stay within its budget, and its plan.

    `workload_of`, `rate_of`: of a run with chosen settings. Raises InputError where nothing fits.
    """
    own = resident_bytes()
    budget = budget_bytes(run, hardware, own)

    def held(variant: RunConfig, row_tokens: int) -> RunMemory:
        workload = workload_of(variant)
        shape = shape_of(variant, workload, row_tokens)
        return run_memory(
            variant, config, computation, shape, workload.distinct_tokens, workload.answering
        )  # fmt: skip

    while True:
        own = max(own, resident_bytes() + RUN_BYTES)  # planning itself brings in what training needs
        found = fit(run, workload_of(run).row_tokens, budget, own, held)
        plan = make_plan(
            found.run, model, config, computation, hardware, workload_of(found.run), rate_of(found.run), with_time,
            found.choices, budget,
        )  # fmt: skip
        if plan.peak_bytes * MARGIN <= budget:
            return found.run, plan
        own += plan.peak_bytes - found.peak_bytes


class Held(Protocol):
    """What a run's step holds."""

    @property
    def layers(self) -> int:
        """Those whose frozen weights are in 4 bits."""

    def bytes(self, resident_layers: int | None) -> int:
        """With so many layers' frozen weights resident (None: all); without the process's own memory."""


@dataclass(frozen=True)
class Fitted:
    """A run that fits.

    Attributes:
        choices: what was chosen, and why.
        peak_bytes: expected, the process's own memory included.
    """

    run: RunConfig
    choices: tuple[Choice, ...]
    budget_bytes: int
    peak_bytes: int


def is_wanted(run: RunConfig) -> bool:
    """Whether settings are to be chosen for this run."""
    return run.memory is not None or run.method == "auto"


def budget_bytes(run: RunConfig, hardware: Hardware, own_bytes: int) -> int:
    """What the run may hold in all. Raises InputError for more than the machine has, or has left.

    own_bytes: what this process holds already, which is not among what is available.
    """
    left = hardware.available_bytes + own_bytes
    if run.memory is None or run.memory == "auto":
        return left
    asked = parse_bytes(run.memory)
    if asked > ROUNDED * hardware.memory_bytes:
        raise InputError(
            f"{run.memory} is more than the {hardware.memory_bytes / 1e9:.2f} GB this machine (or its container) "
            "has; give less, or auto for what is left",
            where="memory",
        )
    if asked * (1 - FORGIVEN) > left:
        raise InputError(
            f"{run.memory} are not left: {left / 1e9:.2f} GB of {hardware.memory_bytes / 1e9:.2f} GB are; end other "
            "programs, give less, or auto for what is left",
            where="memory",
        )
    return min(asked, left)


def fit(
    run: RunConfig, row_tokens: int, budget: int, own_bytes: int, held: Callable[[RunConfig, int], Held],
    allowed: Callable[[Variant], bool] = lambda variant: True,
) -> Fitted:  # fmt: skip
    """The quickest variant whose expected peak, with a margin, is within `budget` bytes.

    Args:
        own_bytes: of the process before the model is there.
        held: of a variant, with rows of so many tokens.
        allowed: which variants there are on the machine in question.

    Raises InputError where none is: what is missing, and which length of rows would fit.
    """
    smallest: tuple[int, Variant] | None = None
    known: dict[str, Held] = {}
    for variant in filter(allowed, variants(run, row_tokens)):
        key = repr((variant.run.method, variant.run.train))
        if key not in known:
            known[key] = held(variant.run, row_tokens)
        memory = known[key]
        resident = variant.run.train.resident_layers
        if not variant.streams:
            peak = own_bytes + memory.bytes(resident)
        else:
            peak = own_bytes + memory.bytes(0)
            resident = _most_resident(memory, budget, own_bytes)
        if peak * MARGIN <= budget:
            if not variant.streams:
                return Fitted(variant.run, variant.choices, budget, peak)
            assert resident is not None
            return _streamed(variant, resident, memory, budget, own_bytes + memory.bytes(resident))
        if smallest is None or peak < smallest[0]:
            smallest = peak, variant
    assert smallest is not None
    raise InputError(_refusal(*smallest, row_tokens, budget, own_bytes, held), where="memory")


def _most_resident(memory: Held, budget: int, own_bytes: int) -> int:
    fitting = [n for n in range(memory.layers) if (own_bytes + memory.bytes(n)) * MARGIN <= budget]
    return max(fitting, default=0)


def _streamed(variant: Variant, resident: int, memory: Held, budget: int, peak: int) -> Fitted:
    reason = f"{memory.layers - resident} of {memory.layers} layers are read from the disk, one ahead of its use"
    train = variant.run.train.model_copy(update={"resident_layers": resident})
    choices = (*variant.choices, Choice("train.resident_layers", resident, reason))
    return Fitted(variant.run.model_copy(update={"train": train}), choices, budget, peak)


def _refusal(
    peak: int, variant: Variant, row_tokens: int, budget: int, own_bytes: int, held: Callable[[RunConfig, int], Held]
) -> str:
    """What is missing, and the longest rows (by halves) that would fit."""
    chosen = [f"{choice.setting}={choice.value}" for choice in variant.choices]
    chosen += ["train.resident_layers=0"] if variant.streams else []
    with_them = f" with {', '.join(chosen)}" if chosen else ""
    sentence = (
        f"{budget / 1e9:.2f} GB are too few: the least that this run takes is {peak * MARGIN / 1e9:.2f} GB"
        f"{with_them}, {(peak * MARGIN - budget) / 1e9:.2f} GB more"
    )
    tokens = row_tokens // 2
    while tokens >= 64:
        memory = held(variant.run, tokens)
        shorter = own_bytes + memory.bytes(0 if variant.streams else variant.run.train.resident_layers)
        if shorter * MARGIN <= budget:
            return f"{sentence}. Rows of {tokens} tokens would fit (data.max_tokens={tokens})"
        tokens //= 2
    return f"{sentence}. Shorter rows alone do not help; take a smaller model or a smaller lora.rank"
