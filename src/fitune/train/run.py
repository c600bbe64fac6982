"""A whole training run: from a run file to a run folder with an adapter (or weights), step by step."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fitune.adapters.lora import FOUR_BITS, adapter_digest, belongs_to_four_bits, save_adapter
from fitune.adapters.started_from import settings_of
from fitune.atomic import write_text
from fitune.config import dump
from fitune.config.schema import LoraSettings, RunConfig
from fitune.data.dataset import TrainingData, load_training_data
from fitune.data.encoded_file import Watch
from fitune.data.token_table import lengths_of
from fitune.errors import DiskFullError, InputError
from fitune.fuse.attention import obstacle
from fitune.fuse.model import FusedModel
from fitune.fuse.replace import FusionReport
from fitune.hardware import Hardware, detect, disk_free_bytes, lies_in_memory
from fitune.models.dropout import set_dropout
from fitune.models.find import find_model
from fitune.models.graph import build_graph, head_name
from fitune.models.positions import check_positions
from fitune.models.source import ModelSource
from fitune.models.store import Progress as StoreProgress
from fitune.plan.budget import is_wanted, plan_within
from fitune.plan.computation import Computation, choose_computation
from fitune.plan.levers import CHOSEN
from fitune.plan.planner import Plan, Workload, make_plan
from fitune.process_memory import peak_bytes
from fitune.step.objective import PAIRED
from fitune.step.ranks import ALONE, Ranks
from fitune.train.loop import (
    Record,
    Rows,
    StepRecord,
    Watcher,
    count_steps,
    learning_rate,
    run_loop,
)
from fitune.train.prepare import build_for_training
from fitune.train.resuming import identity_of, refuse_another_run, resume_point
from fitune.train.run_folder import RunFolder, find_adapter
from fitune.train.scoring import Questions, Scorer, ScoreRecord, questions_of
from fitune.train.tensorboard_log import TensorBoardLog
from fitune.train.trackers import Trackers, check_trackers
from fitune.train.trained_model import read_run_config
from fitune.train.weights import save_weights

# Of more data a part is counted for the plan, which tells as much.
COUNTED_TOKENS = 1 << 24
PACKAGES = ("fitune", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True)
class Prepared:
    """Everything decided and read, nothing trained: what `plan` shows and `train` goes on from.

    Attributes:
        plan: made already where settings were chosen by it.
        questions: what is answered for scores on the way; None: nothing is.
        unpacked: why rows hold one sample each although packing was not switched off; None where it is not so.
    """

    config: RunConfig
    hardware: Hardware
    source: ModelSource
    computation: Computation
    data: TrainingData
    rows: Rows
    workload: Workload
    unpacked: str | None
    plan: Plan | None = None
    questions: Questions | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        losses: (step, loss) of every step; validation: (step, loss) where validated.
        digest: over the exact bits of what was trained; empty in other processes than the first.
        scores: of the answers on the way.
    """

    folder: RunFolder
    plan: Plan
    fusion: FusionReport
    model: FusedModel
    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    records: list[StepRecord]
    seconds: float
    peak_bytes: int
    digest: str
    scores: list[ScoreRecord] = field(default_factory=list)


def prepare_run(
    config: RunConfig, choose: bool = True, with_time: bool = True, watch: Watch | None = None,
    data: TrainingData | None = None, ranks: Ranks = ALONE,
) -> Prepared:  # fmt: skip
    """Finds the model, reads and encodes the data (`watch` hears how far), resolves the computation, sets threads.

    `data`: where they have been read already, as the run file says. `ranks`: processes that share the run; those of
    one machine have equal parts of it.

    Where the run has a memory budget or method auto, its settings are chosen to fit, and the plan made, unless not
    to `choose`: a resumed run has the settings that it began with. Raises InputError where nothing fits.
    """
    check_trackers(config.train.trackers or ())
    hardware = detect().part(ranks.local_count)
    computation = choose_computation(config, hardware, ranks=ranks)
    computation.begin()
    source = find_model(config.model)
    set_dropout(source.config, config.train.model_dropout)
    tokenizer = source.tokenizer()
    check_positions(config.data.max_tokens, source.config, config.model)
    if config.lora.initial == "loftq" and source.quantised_folder() is not None:
        raise InputError(
            f"{source.reference} is in these 4 bits already, so that loftq has nothing to make up for; leave it out, "
            "or take the 16-bit model",
            where="lora.initial",
        )
    graph = build_graph(source.config, computation.dtype)
    config = _with_its_adapter(config, source, graph)
    if data is None:
        data = load_training_data(config.data, tokenizer, config.seed, watch, config.train.objective)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    unpacked = obstacle(graph) if config.data.pack else None
    pack = config.data.pack and unpacked is None
    of_pairs = config.train.objective in PAIRED
    if of_pairs and (reason := obstacle(graph)) is not None:
        raise InputError(f"two answers cannot lie in a row of this model: {reason}", where="train.objective")
    rows = Rows(
        data.train, _row_tokens(config, data, pack), config.train.micro_batch, config.train.accumulation,
        config.seed, pack, int(pad or 0), share=config.train.objective == "supervised",
        watch=watch,
    )  # fmt: skip
    questions = questions_of(config, source, data, tokenizer)
    workload = _workload(config, rows, questions)
    prepared = Prepared(
        config, hardware, source, computation, data, rows, workload, unpacked, questions=questions
    )  # fmt: skip
    prepared = _fitted(prepared, with_time) if choose and is_wanted(config) else prepared
    _check_processes(prepared.config, ranks)
    return prepared


def _check_processes(config: RunConfig, ranks: Ranks) -> None:
    """Raises InputError for settings that several processes cannot share."""
    train, count = config.train, ranks.count
    if train.accumulation < count:
        raise InputError(
            f"{count} processes share the micro-batches of a step, and there are {train.accumulation}; give at least "
            f"{count}, best a multiple of it (train.accumulation={count})",
            where="train.accumulation",
        )
    if count > 1 and train.optimizer_states == "disk":
        raise InputError("several processes need them in memory", where="train.optimizer_states")


def _with_its_adapter(config: RunConfig, source: ModelSource, graph: PreTrainedModel) -> RunConfig:
    """The run's settings of the adapter that it goes on from, where it does.

    Raises InputError where they are given and others, or the adapter cannot be gone on with.
    """
    if config.lora.start_from is None:
        return config
    folder = find_adapter(Path(config.lora.start_from))
    if belongs_to_four_bits(folder) and config.method != "qlora":
        raise InputError(
            "this adapter makes up for the 4 bits of its base (lora.initial loftq); go on from it with method qlora",
            where=folder,
        )
    found = asdict(settings_of(folder, graph, head_name(graph), source.graph_module))
    given = {name: getattr(config.lora, name) for name in found}
    wrong = [
        f"lora.{name} is {given[name]}, but the adapter's is {value}; leave it out, or give the same"
        for name, value in found.items()
        if given[name] not in (value, LoraSettings.model_fields[name].default)
    ]
    if wrong:
        raise InputError(wrong, where=folder)
    return config.model_copy(update={"lora": config.lora.model_copy(update=found)})


def _fitted(prepared: Prepared, with_time: bool) -> Prepared:
    """The same with settings chosen so that the run stays within its budget."""

    source = prepared.source
    config, plan = plan_within(
        prepared.config, source.reference, source.config, prepared.computation, prepared.hardware,
        lambda run: workload_of(prepared, run), learning_rate, with_time,
    )  # fmt: skip
    rows = _rows_of(prepared, config)
    return replace(
        prepared, config=config, rows=rows, workload=_workload(config, rows, prepared.questions), plan=plan
    )


def workload_of(prepared: Prepared, run: RunConfig) -> Workload:
    """The same data with other settings of the run."""
    return _workload(run, _rows_of(prepared, run), prepared.questions)


def _rows_of(prepared: Prepared, run: RunConfig) -> Rows:
    return replace(prepared.rows, micro_batch=run.train.micro_batch, accumulation=run.train.accumulation)


def resumed(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The run file with the settings that were chosen, where any were, when the run in `folder` began."""
    if not is_wanted(config) or not folder.config_file.is_file():
        return config
    before = read_run_config(folder)
    train = {name.removeprefix("train."): getattr(before.train, name.removeprefix("train.")) for name in CHOSEN}
    return config.model_copy(update={"method": before.method, "train": config.train.model_copy(update=train)})


def _workload(config: RunConfig, rows: Rows, questions: Questions | None) -> Workload:
    """What the run's steps hold, counted on the rows of the first epoch, or on enough of them."""
    counted, tokens, documents, trained, longest = 0, 0, 0, 0, 0
    different: set[int] | None = set()
    for step in rows.epoch(0):
        for batch in rows.batches(step):
            tokens += batch.tokens.numel()
            documents += len(batch.documents)
            trained += batch.trained_tokens
            longest = max(longest, batch.tokens.shape[1])
            if different is not None:
                different.update(batch.tokens.unique().tolist())
        counted += 1
        if tokens >= COUNTED_TOKENS:
            different = None  # others may come later
            longest = max(longest, min(rows.row_tokens, int(lengths_of(rows.samples).max())))
            break
    steps = count_steps(rows, config.train.epochs, config.train.steps)
    return Workload(
        steps,
        round(steps * tokens / counted),
        max(1, tokens // documents),
        trained / tokens,
        longest,
        None if different is None else len(different),
        None if questions is None else questions.answering,
    )


def _row_tokens(config: RunConfig, data: TrainingData, pack: bool) -> int:
    """Rows are as long as asked for, but no longer than all the data together, or (unpacked) the longest sample."""
    lengths = data.train.lengths
    return min(config.data.max_tokens, int(lengths.sum(dtype="int64") if pack else lengths.max()))


def plan_run(prepared: Prepared, with_time: bool = True) -> Plan:
    """The plan of a prepared run."""
    if prepared.plan is not None:
        return prepared.plan
    config = prepared.config
    return make_plan(
        config, prepared.source.reference, prepared.source.config, prepared.computation, prepared.hardware,
        prepared.workload, learning_rate(config), with_time,
    )  # fmt: skip


def default_folder(config: RunConfig) -> Path:
    """Where a run goes that was given no folder: runs/MODEL-METHOD-TIME."""
    name = Path(config.model).stem or "model"
    return Path("runs") / f"{name}-{config.method}-{datetime.now():%Y%m%d-%H%M%S}"


def train_run(
    prepared: Prepared, plan: Plan, folder: RunFolder, resume: bool = False, watch: Watcher | None = None,
    store_progress: StoreProgress | None = None, say: Callable[[str], None] = lambda line: None,
    before: Callable[[FusedModel], None] | None = None, force: bool = False, ranks: Ranks = ALONE,
) -> Outcome:  # fmt: skip
    """Trains a prepared run in `folder` and saves what came out.

    `say` gets one line for whatever the user should know; `before` sees the model before its first step. With
    `resume` the run goes on from its newest whole checkpoint, and with `force` although something of it changed. Of
    several `ranks` the first one alone writes; all are given the same folder.

    Raises InputError where the folder already holds a run that is not to be resumed, or another run.
    """
    config = prepared.config
    if ranks.is_first:
        folder.lock()
    ranks.any(False)  # nobody goes on where the first one could not
    try:
        identity = identity_of(config, prepared)
        start_from = resume_point(folder, identity, config, say, force) if resume else None
        if not resume:
            refuse_another_run(folder)
        ranks.any(False)  # all have looked at what was there
        if ranks.is_first:
            write_text(folder.config_file, dump(config.model_copy(update={"output": str(folder.path)})))
            folder.write_json(folder.plan_file, plan.as_dict())
        _check_disk(plan, folder, say)
        model = build_for_training(
            config, prepared.source, prepared.computation, store_progress, prepared.rows.first_batches(), resume
        )
        for part, reason in model.report.left.items():
            lacks = {"adapter": "no ", "int8": "not in "}.get(part.split(" ")[0], "not fused: ")
            say(f"{lacks}{part}: {reason}")
        if prepared.unpacked is not None:
            say(f"one sample a row, not packed: {prepared.unpacked}")
        elif (prepared.rows.pack or config.train.objective in PAIRED) and not model.report.packs:
            other = "" if config.train.objective in PAIRED else "; set it to false"
            raise InputError(
                f"{config.model} cannot be packed: {model.report.left['attention']}{other}",
                where="train.objective" if config.train.objective in PAIRED else "data.pack",
            )
        if before is not None:
            before(model)
        losses: list[tuple[int, float]] = []
        validation: list[tuple[int, float]] = []
        scores: list[ScoreRecord] = []
        records: list[StepRecord] = []
        board = TensorBoardLog(folder.tensorboard, say) if ranks.is_first else None
        names = (config.train.trackers or ()) if ranks.is_first else ()
        trackers = Trackers(names, folder, config.model_dump(mode="json"), say, is_new=start_from is None)
        is_whole = False

        def collect(record: Record) -> None:
            if isinstance(record, StepRecord):
                losses.append((record.step, record.loss))
                records.append(record)
            elif isinstance(record, ScoreRecord):
                scores.append(record)
            else:
                validation.append((record.step, record.validation_loss))
            if board is not None:
                board(record)
            trackers(record)
            if watch is not None:
                watch(record)

        scorer = _scorer(prepared, model, say, ranks)
        started = time.perf_counter()
        try:
            progress = run_loop(
                config, model, prepared.rows, prepared.data.validation, folder, identity, start_from, collect, say,
                plan.budget_bytes, ranks, scorer,
            )  # fmt: skip
            base = {"reference": prepared.source.reference, "identity": prepared.source.identity()}
            if _is_for_four_bits(config):
                base["weights"] = FOUR_BITS
            digest = _save_result(model, prepared.source, base, folder) if ranks.is_first else ""
            seconds = time.perf_counter() - started
            summary = {
                "model": config.model, "note": prepared.source.note, "method": config.method, "base": base,
                "steps": progress.step, "final_loss": losses[-1][1] if losses else None,
                "validation_loss": validation[-1][1] if validation else None,
                "score": asdict(scores[-1]) if scores else None, "seconds": round(seconds, 1),
                "peak_bytes": peak_bytes(), "planned_peak_bytes": plan.peak_bytes, "sha256": digest,
                "replaced": dict(model.report.replaced), "left": model.report.left,
                "machine": machine(prepared.hardware),
                "data": prepared.data.report.as_json(),
            }  # fmt: skip
            if ranks.is_first:
                folder.write_json(folder.summary_file, summary)
            is_whole = True
        finally:  # trackers may take their time, or never end: the result is there by then
            if board is not None:
                board.close()
            trackers.close(is_whole)
    finally:
        folder.unlock()
    return Outcome(
        folder, plan, model.report, model, losses, validation, records, seconds, peak_bytes(), digest, scores
    )  # fmt: skip


def _scorer(prepared: Prepared, model: FusedModel, say: Callable[[str], None], ranks: Ranks) -> Scorer | None:
    """What answers and scores on the way, where that is asked for."""
    if prepared.questions is None:
        return None
    if model.stream is not None:
        say("warning: every token of an answer reads layers from the disk, so that scores are slow to come")
    return Scorer(prepared.config, prepared.source, prepared.questions, ranks)


def _save_result(model: FusedModel, source: ModelSource, base: dict[str, str], folder: RunFolder) -> str:
    """The adapter, or all weights; returns a hash over what was trained."""
    if model.adapted is None:
        return save_weights(model, source, folder.weights)
    save_adapter(model.adapted, folder.adapter, base, source.outer_module)
    return adapter_digest(model.adapted)


def _is_for_four_bits(config: RunConfig) -> bool:
    """Whether the run's adapter makes up for the 4 bits of its base, by itself or by what it goes on from."""
    start = config.lora.start_from
    return config.lora.initial == "loftq" or (start is not None and belongs_to_four_bits(find_adapter(Path(start))))


def _check_disk(plan: Plan, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Raises DiskFullError where the optimizer's file will not fit, before hours are spent on the model."""
    if not plan.disk_bytes:
        return
    free = disk_free_bytes(folder.path)
    if free < plan.disk_bytes:
        raise DiskFullError(
            f"{folder.path}: train.optimizer_states: disk needs {plan.disk_bytes / 1e9:.2f} GB there, "
            f"{free / 1e9:.2f} GB are free"
        )
    if lies_in_memory(folder.path):
        say(f"warning: {folder.path} lies in memory (tmpfs): optimizer states on this disk save none")


def machine(hardware: Hardware) -> dict[str, Any]:
    """What a run was made on and with."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": hardware.cpu_model,
        "threads": hardware.threads,
        "instruction_sets": sorted(hardware.instruction_sets),
        "memory_bytes": hardware.memory_bytes,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }
