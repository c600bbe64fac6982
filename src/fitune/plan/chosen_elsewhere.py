"""Settings for a machine that is not this one: the quickest run that fits it, of the same variants as here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from fitune.config.byte_size import parse_bytes
from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.hardware import detect
from fitune.plan.budget import MARGIN, Fitted, Held, fit
from fitune.plan.computation import choose_computation
from fitune.plan.elsewhere import gpu_dtype, gpu_memory
from fitune.plan.levers import Variant
from fitune.plan.machines import Machine
from fitune.plan.planner import RUN_BYTES, Workload, run_memory, shape_of
from fitune.process_memory import resident_bytes


def choose_for(
    run: RunConfig, config: PretrainedConfig, machine: Machine, workload_of: Callable[[RunConfig], Workload]
) -> Fitted:  # fmt: skip
    """The quickest variant whose peak fits on each device of `machine`, or into the run's budget where that is less.

    Dry-runs once for each that is tried. Raises InputError where none fits, and for a budget that is more than there
    is.
    """
    budget = machine.memory_bytes
    if run.memory not in (None, "auto"):
        budget = parse_bytes(run.memory or "")
        if budget > machine.memory_bytes:
            raise InputError(
                f"{run.memory} is more than the {machine.memory_bytes / 1e9:.2f} GB of {machine.name}; give less, or "
                "auto for all of it",
                where="memory",
            )
    row_tokens = workload_of(run).row_tokens
    if machine.kind == "gpu":

        def on_gpu(variant: RunConfig, tokens: int) -> Held:
            workload = replace(workload_of(variant), row_tokens=tokens)
            return _OnGpu(gpu_memory(variant, config, workload, gpu_dtype(variant, machine)[0]).peak_bytes)

        return fit(run, row_tokens, budget, 0, on_gpu, _is_for_a_gpu)
    computation = choose_computation(run, detect(with_accelerators=False))

    def on_cpu(variant: RunConfig, tokens: int) -> Held:
        workload = workload_of(variant)
        shape = shape_of(variant, workload, tokens)
        return run_memory(variant, config, computation, shape, workload.distinct_tokens, workload.answering)

    own = resident_bytes() + RUN_BYTES
    while True:
        found = fit(run, row_tokens, budget, own, on_cpu)
        now = resident_bytes() + RUN_BYTES  # planning itself brings in what training needs
        if (found.peak_bytes - own + now) * MARGIN <= budget:
            return found
        own = max(own + 1, now)


@dataclass(frozen=True)
class _OnGpu:
    """What a run takes of a GPU; none of its layers come from elsewhere."""

    peak: int
    layers: int = 0

    def bytes(self, resident_layers: int | None) -> int:
        return self.peak


def _is_for_a_gpu(variant: Variant) -> bool:
    return not variant.streams and variant.run.train.optimizer_states == "memory"
