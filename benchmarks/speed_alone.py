"""Our side by itself: a setting of its run file, started in a fresh process; and the figures of a setting."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from speed_cases import RANK, Case
from speed_inputs import Inputs, prepared_inputs, write_run_file
from speed_process import Worker
from speed_rounds import Recompute, start_ours


@dataclass(frozen=True)
class Setting:
    """How our side trains the rows of a case.

    Attributes:
        without: the name of a part that it does without (`speed_switches`); None: nothing.
        environment: of its process, besides.
    """

    compute: str
    threads: int
    rank: int = RANK
    recompute: Recompute = "none"
    without: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def inputs_alone(case: Case, cache: Path, scratch: Path, different_steps: int) -> Inputs:
    """Writes what our side reads of a case of fixed rows; it begins with a fresh adapter, the same every time.

    No more steps than are taken: the process keeps them, some 100 bytes a token.
    """
    return replace(prepared_inputs(case, cache, scratch, None, 0, different_steps), adapter=None)


def start_alone(inputs: Inputs, setting: Setting) -> Worker:
    """Raises WorkerFailed."""
    run_file = inputs.scratch / "run.yaml"
    write_run_file(
        inputs.case, inputs.model, inputs.data, run_file, compute=setting.compute, recompute=setting.recompute,
        threads=setting.threads, rank=setting.rank,
    )  # fmt: skip
    return start_ours(inputs, run_file, setting.threads, setting.without, setting.environment)


@dataclass(frozen=True)
class Figures:
    """Of a process that trains: tokens a second by its median step, and resident bytes, loading included."""

    tokens_per_second: float
    peak_bytes: int
    load_peak_bytes: int
    load_seconds: float
    step_seconds: list[float]


def figures_of(worker: Worker, seconds: Sequence[float]) -> Figures:
    """`seconds`: of its timed steps, which are all alike."""
    rate = worker.step_tokens[0] / statistics.median(seconds)
    return Figures(rate, worker.memory()[0], worker.load_peak_bytes, worker.load_seconds, list(seconds))
