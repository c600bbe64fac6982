"""The plan of a run: every number resolved, each with its origin, before anything is trained."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

from fitune.config.schema import RunConfig
from fitune.hardware import Hardware
from fitune.plan.anatomy import read_anatomy
from fitune.plan.computation import Computation
from fitune.plan.dry_run import Shape, step_memory, step_seconds
from fitune.process_memory import give_back_free_memory, resident_bytes


@dataclass(frozen=True)
class Item:
    """One number of the plan. `origin` is one of: you, default, model, data, derived, dry run, probe, machine."""

    name: str
    value: int | float | str
    unit: str
    origin: str


@dataclass(frozen=True)
class Workload:
    """What the data asks for: optimizer steps and tokens of the whole run, documents' mean length, trained share.

    Steps and tokens are 0 where there is no data yet, as with a preset.
    """

    steps: int
    tokens: int
    mean_document_tokens: int
    trained_share: float
    row_tokens: int


@dataclass(frozen=True)
class Plan:
    """What `train` will do and what it should take.

    Attributes:
        seconds_per_step, seconds: None where they are not known: the probe was left out, or there is no data yet.
        memory: items in bytes, which add up to `peak_bytes`.
        settings: everything resolved that is not memory.
        disk_bytes: room that the run takes in its folder while it trains, for `train.optimizer_states: disk`.
    """

    model: str
    method: str
    peak_bytes: int
    available_bytes: int
    seconds_per_step: float | None
    seconds: float | None
    peak_operator: str
    memory: tuple[Item, ...]
    settings: tuple[Item, ...]
    disk_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the expected peak is within what the machine has left."""
        return self.peak_bytes <= self.available_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "fits": self.fits}


def _origin(name: str, given: Collection[str]) -> str:
    return "you" if name in given else "default"


def make_plan(
    run: RunConfig, model: str, config: PretrainedConfig, computation: Computation, hardware: Hardware,
    workload: Workload, learning_rate: float, with_time: bool = True,
) -> Plan:  # fmt: skip
    """Counts the model's weights, dry-runs and probes the step of this run.

    Takes some seconds. The process's own memory is what it holds when that is done: by then all that training imports
    and keeps (the kernels' workspace, torch's threads and compiled products) is there.
    Raises FituneError for a model whose step cannot be dry-run.
    """
    before = resident_bytes()
    tokens = workload.row_tokens
    document = max(1, min(workload.mean_document_tokens, tokens))
    places = run.train.micro_batch * tokens
    trained = min(max(1, round(places * workload.trained_share)), places - 1)
    shape = Shape(run.train.micro_batch, tokens, document, trained)
    anatomy = read_anatomy(run, config, computation.dtype)
    arguments = (run, config, anatomy, shape, computation.dtype, computation.backend)
    step = step_memory(*arguments)
    weights = anatomy.frozen_bytes + anatomy.int8_bytes + anatomy.trained_bytes
    seconds = None
    # The probe is a real step of a few layers.
    if with_time and weights + step.peak <= hardware.available_bytes:
        seconds = step_seconds(*arguments, step.parts) * run.train.accumulation
    gc.collect()
    give_back_free_memory()
    overhead = resident_bytes()
    # What the parts are at the peak, where not all of each need be alive.
    saved = min(step.saved, step.peak - step.optimizer)
    gradients = 0 if step.disk else min(anatomy.trained_bytes, step.peak - step.optimizer - saved)
    workspace = step.peak - step.optimizer - saved - gradients
    memory = (
        Item("frozen weights", anatomy.frozen_bytes, "bytes", "model"),
        *((Item("int8 scales, columns", anatomy.int8_bytes, "bytes", "derived"),) if anatomy.int8_bytes else ()),
        Item("trained weights", anatomy.trained_bytes, "bytes", "derived"),
        Item("gradients", gradients, "bytes", "derived"),
        Item("optimizer states", step.optimizer, "bytes", "dry run"),
        Item("saved activations", saved, "bytes", "dry run"),
        Item("workspaces, logits", workspace, "bytes", "dry run"),
        Item("Python, torch, transformers", overhead, "bytes", "machine"),
    )
    peak = overhead + weights + step.peak
    whole = None
    if seconds is not None and workload.tokens:
        whole = seconds * workload.tokens / (shape.rows * tokens * run.train.accumulation)
    train, fields = run.train, run.train.model_fields_set
    length = (
        Item("steps", workload.steps, "", "you" if train.steps else "derived"),
        Item("tokens", workload.tokens, "", "data"),
    )
    settings = (
        Item("rank", run.lora.rank, "", _origin("rank", run.lora.model_fields_set)),
        Item("learning rate", learning_rate, "", "you" if train.learning_rate else "default"),
        Item("micro-batch", train.micro_batch, "rows", _origin("micro_batch", fields)),
        Item("accumulation", train.accumulation, "micro-batches", _origin("accumulation", fields)),
        Item("row", tokens, "tokens", "data"),
        *(length if workload.steps else ()),
        Item("computation", computation.reason, "", "machine"),
        Item("threads", computation.threads, "", "you" if train.threads else "machine"),
        *((Item("on disk while training", f"{step.disk / 1e9:.2f}", "GB", "derived"),) if step.disk else ()),
    )
    return Plan(
        model, run.method, peak, hardware.available_bytes + before, seconds, whole, step.peak_operator,
        memory, settings, step.disk,
    )  # fmt: skip
