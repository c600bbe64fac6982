"""The plan of a run: every number resolved, each with its origin, before anything is trained."""

from __future__ import annotations

import gc
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

from fitune.config.schema import RunConfig
from fitune.hardware import Hardware
from fitune.models.dropout import told
from fitune.plan.anatomy import Anatomy, read_anatomy
from fitune.plan.answering import NOTHING, Answering, AnsweringMemory, answering_memory
from fitune.plan.computation import Computation
from fitune.plan.dry_run import PROBE_LAYERS, Shape, StepMemory, probe_bytes, step_memory, step_seconds
from fitune.plan.levers import Choice
from fitune.process_memory import give_back_free_memory, resident_bytes
from fitune.quant.stream import resident_groups

# What a run holds besides what planning leaves behind: the objects of the whole model, threads' workspaces, small
# tensors; 3 to 45 MB in six runs of two models (docs/log.md, "rooms in the plan").
RUN_BYTES = 25_000_000
# What the client of one of train.trackers takes: of MLflow's (mlflow-skinny), which was measured.
TRACKER_BYTES = 70_000_000
# What the metrics' packages take (sacrebleu, rouge-score): 21 to 22 MB after 50 answers of text.
SCORING_BYTES = 22_000_000
# Linux brings in so much of a mapped file around what is touched (fault_around_bytes, its default).
FAULT_BYTES = 1 << 16


@dataclass(frozen=True)
class Item:
    """One number of the plan.

    `origin` is one of: you, default, budget, model, data, derived, dry run, probe, machine, published.
    """

    name: str
    value: int | float | str
    unit: str
    origin: str


@dataclass(frozen=True)
class Workload:
    """What the data asks for: optimizer steps and tokens of the whole run, documents' mean length, trained share.

    Steps and tokens are 0 where there is no data yet, as with a preset. `distinct_tokens`: how many of the
    vocabulary the data have; None: not known. `answering`: the scores on the way; None: there are none.
    """

    steps: int
    tokens: int
    mean_document_tokens: int
    trained_share: float
    row_tokens: int
    distinct_tokens: int | None = None
    answering: Answering | None = None


@dataclass(frozen=True)
class Plan:
    """What `train` will do and what it should take.

    Attributes:
        seconds_per_step, seconds: None where they are not known: the probe was left out, or there is no data yet.
        memory: items in bytes, which add up to `peak_bytes`.
        settings: everything resolved that is not memory.
        choices: settings that were chosen to stay within the budget.
        budget_bytes: what the run may take; None: what is available.
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
    choices: tuple[Choice, ...] = ()
    budget_bytes: int | None = None
    disk_bytes: int = 0

    @property
    def limit_bytes(self) -> int:
        """The budget, or what the machine has left where that is less."""
        return self.available_bytes if self.budget_bytes is None else min(self.available_bytes, self.budget_bytes)

    @property
    def fits(self) -> bool:
        """Whether the expected peak is within the limit."""
        return self.peak_bytes <= self.limit_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "fits": self.fits}


@dataclass(frozen=True)
class RunMemory:
    """What a run's model and step hold, without the process's own memory.

    Attributes:
        layers: of which the frozen weights are in 4 bits.
        untouched: bytes of a mapped table of embeddings that the data do not touch, where all layers stay.
        answering: of answering questions between two steps, beside weights and the optimizer's states.
    """

    anatomy: Anatomy
    step: StepMemory
    untouched: int = 0
    answering: AnsweringMemory = NOTHING

    @property
    def layers(self) -> int:
        return len(self.anatomy.layer_bytes)

    def at_peak(self, resident_layers: int | None) -> tuple[int, int]:
        """Bytes of all weights, where so many layers' frozen ones stay (None: all), and of the step, at its peak.

        Where weights come and go that is when the logits are made, for which the head is there, or later.
        """
        anatomy, step = self.anatomy, self.step
        weights = anatomy.resident_bytes(resident_layers) + anatomy.int8_bytes + anatomy.trained_bytes
        visiting = anatomy.visiting_bytes(resident_layers)
        if visiting + step.at_head > step.resident:
            return weights + visiting, step.at_head
        return weights - (self.untouched if resident_layers is None else 0), step.resident

    def more_to_answer(self, resident_layers: int | None) -> int:
        """By how much answering between two steps exceeds the peak of a step."""
        if not self.answering.bytes:
            return 0
        anatomy = self.anatomy
        weights = anatomy.resident_bytes(resident_layers) + anatomy.int8_bytes + anatomy.trained_bytes
        weights += max(0, anatomy.visiting_bytes(resident_layers))
        weights -= self.untouched if resident_layers is None else 0
        held = weights + self.step.optimizer + self.answering.bytes
        return max(0, held - sum(self.at_peak(resident_layers)))

    def bytes(self, resident_layers: int | None) -> int:
        """At the peak of the run."""
        return sum(self.at_peak(resident_layers)) + self.more_to_answer(resident_layers)


def shape_of(run: RunConfig, workload: Workload, row_tokens: int | None = None) -> Shape:
    """A micro-batch of the run; `row_tokens` instead of the workload's."""
    tokens = row_tokens or workload.row_tokens
    places = run.train.micro_batch * tokens
    trained = min(max(1, round(places * workload.trained_share)), places - 1)
    return Shape(run.train.micro_batch, tokens, max(1, min(workload.mean_document_tokens, tokens)), trained)


def run_memory(
    run: RunConfig, config: PretrainedConfig, computation: Computation, shape: Shape,
    distinct_tokens: int | None = None, answering: Answering | None = None,
) -> RunMemory:  # fmt: skip
    """Counts the model's weights and dry-runs its step. Raises FituneError where that cannot be.

    `distinct_tokens`: how many of the vocabulary the data have; None: all of it is counted. `answering`: the scores
    on the way; None: there are none.
    """
    anatomy = read_anatomy(run, config, computation.dtype)
    step = step_memory(run, config, anatomy, shape, computation.dtype, computation.backend)
    more = answering_memory(run, config, anatomy, answering, computation.dtype, computation.backend)
    return RunMemory(anatomy, step, _untouched_bytes(anatomy, distinct_tokens), more)


def _untouched_bytes(anatomy: Anatomy, distinct_tokens: int | None) -> int:
    """Of a table of embeddings that is mapped from a store: rows of tokens that the data do not have."""
    if distinct_tokens is None:
        return 0
    stretches = max(1, anatomy.end_bytes // FAULT_BYTES)
    share = 1 - math.exp(-distinct_tokens / stretches)  # of them has a token, where tokens lie anywhere
    return round(anatomy.end_bytes * (1 - share))


def _origin(name: str, given: Collection[str]) -> str:
    return "you" if name in given else "default"


def trained_share(anatomy: Anatomy) -> str:
    """How many weights learn, and of how many."""
    count = anatomy.trained_elements
    return f"{count:,} weights, {count / max(1, anatomy.elements):.2%} of the model's {anatomy.elements:,}"


def parts_at_peak(step: StepMemory, held: int, trained_bytes: int) -> tuple[int, int, int]:
    """Gradients, saved activations and workspaces when the step holds so much: not all of each need be alive."""
    saved = min(step.saved, held - step.optimizer)
    gradients = 0 if step.disk else min(trained_bytes, held - step.optimizer - saved)
    return gradients, saved, held - step.optimizer - saved - gradients


def _ranks(run: RunConfig) -> int | str:
    """The adapters' rank; with those of other layers, where there are any."""
    others = ", ".join(f"{key} {rank}" for key, rank in run.lora.rank_pattern.items())
    return f"{run.lora.rank}; {others}" if others else run.lora.rank


def _whole(run: RunConfig) -> tuple[Item, ...]:
    """Modules that are trained beside the adapters, where there are any."""
    names = run.lora.modules_to_save
    origin = _origin("modules_to_save", run.lora.model_fields_set)
    return (Item("trained whole", ", ".join(names), "", origin),) if names else ()


def resolved_settings(
    run: RunConfig, workload: Workload, learning_rate: float, chosen: Collection[str] = ()
) -> tuple[Item, ...]:
    """What a run is told to do, whatever it runs on; `chosen`: names of settings that a budget asked for."""
    train, fields = run.train, run.train.model_fields_set

    def origin(name: str) -> str:
        return "budget" if f"train.{name}" in chosen else _origin(name, fields)

    length = (
        Item("steps", workload.steps, "", "you" if train.steps else "derived"),
        Item("tokens", workload.tokens, "", "data"),
    )
    return (
        Item("rank", _ranks(run), "", _origin("rank", run.lora.model_fields_set)),
        *_whole(run),
        Item("learning rate", learning_rate, "", "you" if train.learning_rate else "default"),
        Item("micro-batch", train.micro_batch, "rows", origin("micro_batch")),
        Item("accumulation", train.accumulation, "micro-batches", origin("accumulation")),
        Item("row", workload.row_tokens, "tokens", "data"),
        *(length if workload.steps else ()),
        Item("recompute", train.recompute, "", origin("recompute")),
    )


def make_plan(
    run: RunConfig, model: str, config: PretrainedConfig, computation: Computation, hardware: Hardware,
    workload: Workload, learning_rate: float, with_time: bool = True, choices: tuple[Choice, ...] = (),
    budget_bytes: int | None = None,
) -> Plan:  # fmt: skip
    """Counts the model's weights, dry-runs and probes the step of this run.

    `choices`: what of it was chosen to stay within `budget_bytes`.

    Takes some seconds. The process's own memory is what it holds when that is done: by then all that training imports
    and keeps (the kernels' workspace, torch's threads and compiled products) is there.
    Raises FituneError for a model whose step cannot be dry-run.
    """
    before = resident_bytes()
    shape = shape_of(run, workload)
    held = run_memory(run, config, computation, shape, workload.distinct_tokens, workload.answering)
    anatomy, step = held.anatomy, held.step
    arguments = (run, config, anatomy, shape, computation.dtype, computation.backend)
    weights, of_step = held.at_peak(run.train.resident_layers)
    seconds = None
    # The probe is a real step of a few layers: it must not take more than the run.
    probed = [
        layers for layers in range(PROBE_LAYERS, 0, -1)
        if run.train.resident_layers is None or probe_bytes(anatomy, step, layers) <= weights + of_step
    ]  # fmt: skip
    if with_time and probed and weights + of_step <= hardware.available_bytes:
        share = math.ceil(run.train.accumulation / computation.processes)
        seconds = step_seconds(*arguments, step.parts, probed[0]) * share
    gc.collect()
    give_back_free_memory()
    overhead = resident_bytes() + RUN_BYTES + TRACKER_BYTES * len(run.train.trackers or ())
    overhead += SCORING_BYTES if workload.answering else 0
    answering = held.more_to_answer(run.train.resident_layers)
    gradients, saved, workspace = parts_at_peak(step, of_step, anatomy.trained_bytes)
    memory = (
        Item("frozen weights", weights - anatomy.int8_bytes - anatomy.trained_bytes, "bytes", "model"),
        *((Item("int8 scales, columns", anatomy.int8_bytes, "bytes", "derived"),) if anatomy.int8_bytes else ()),
        Item("trained weights", anatomy.trained_bytes, "bytes", "derived"),
        Item("gradients", gradients, "bytes", "derived"),
        Item("optimizer states", step.optimizer, "bytes", "dry run"),
        Item("saved activations", saved, "bytes", "dry run"),
        Item("workspaces, logits", workspace, "bytes", "dry run"),
        *((Item("more while scoring", answering, "bytes", held.answering.origin),) if answering else ()),
        Item("Python, torch, transformers", overhead, "bytes", "machine"),
    )
    peak = overhead + weights + of_step + answering
    whole = None
    if seconds is not None and workload.tokens:
        whole = seconds * workload.tokens / (shape.rows * shape.tokens * run.train.accumulation)
    origin = "model" if run.train.model_dropout is None else "you"
    settings = (
        *resolved_settings(run, workload, learning_rate, {choice.setting for choice in choices}),
        Item("trained", trained_share(anatomy), "", "derived"),
        *((Item("model's dropout", dropout, "", origin),) if (dropout := told(config)) else ()),
        *_streaming(run, anatomy, choices),
        Item("computation", computation.reason, "", "machine"),
        Item("threads", computation.threads, "", "you" if run.train.threads else "machine"),
        *_processes(computation),
        *_scores(run, workload, held),
        *((Item("on disk while training", step.disk, "bytes", "derived"),) if step.disk else ()),
    )
    return Plan(
        model, run.method, peak, hardware.available_bytes + before, seconds, whole, step.resident_operator,
        memory, settings, choices, budget_bytes, step.disk,
    )  # fmt: skip


def _processes(computation: Computation) -> tuple[Item, ...]:
    """How many share the steps; memory, and threads, are those of each."""
    count = computation.processes
    return (Item("processes", count, "share a step's micro-batches", "machine"),) if count > 1 else ()


def _scores(run: RunConfig, workload: Workload, held: RunMemory) -> tuple[Item, ...]:
    """What is answered for scores on the way."""
    asked = workload.answering
    if asked is None:
        return ()
    how = f"every {run.train.score_every_steps} steps; their time is not in the plan's"
    if held.answering.guessed is not None:
        how += f", and their memory is an estimate ({held.answering.guessed})"
    return (
        Item("scores", how, "", "you"),
        Item("answers hold", held.answering.bytes, "bytes", held.answering.origin),
    )


def _streaming(run: RunConfig, anatomy: Anatomy, choices: tuple[Choice, ...]) -> tuple[Item, ...]:
    """How many layers stay, and what every pass reads, where not all of them stay."""
    origin = "budget" if any(choice.setting == "train.resident_layers" for choice in choices) else "you"
    resident = run.train.resident_layers
    if resident is None or not anatomy.layer_bytes:
        return ()
    staying = resident_groups(len(anatomy.layer_bytes), resident)
    read = sum(size for number, size in enumerate(anatomy.layer_bytes) if number not in staying)
    return (
        Item("resident layers", f"{len(staying)} of {len(anatomy.layer_bytes)}", "", origin),
        Item("read from disk, a pass", read, "bytes", "derived"),
    )
