"""The training loop: rows in, updates out, and what must happen between two of them."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from fitune.atomic import write_text
from fitune.config.schema import RunConfig, TrainSettings
from fitune.data.batch import Batch
from fitune.data.collation import collate
from fitune.data.encoded_file import Watch
from fitune.data.encoding import EncodedSample
from fitune.data.order import Row, epoch_rows
from fitune.data.token_table import lengths_of
from fitune.errors import DiskFullError, FituneError, Interrupted, MemoryShortError
from fitune.fuse.model import FusedModel
from fitune.kernels.rooms import rooms
from fitune.process_memory import give_back_free_memory, resident_bytes
from fitune.step.objective import SUPERVISED, Measured, Objective, measure, objective_of
from fitune.step.optimizer import close, make_optimizer
from fitune.step.parameter_groups import parameter_groups
from fitune.step.ranks import ALONE, Ranks
from fitune.step.schedule import Schedule
from fitune.step.update import NonFiniteError, update
from fitune.train.best_weights import best_step, save_best, take_best
from fitune.train.checkpoint import Progress, list_checkpoints, load_checkpoint, newest_whole, save_checkpoint
from fitune.train.early_stopping import EarlyStopping
from fitune.train.loss_spikes import SpikeWatch, worst_samples
from fitune.train.machine_share import MachineShare
from fitune.train.memory_watch import MemoryWatch
from fitune.train.non_finite import place_of
from fitune.train.patient_file import PatientFile
from fitune.train.run_folder import RunFolder
from fitune.train.scoring import Scorer, ScoreRecord
from fitune.train.stall_watch import StallWatch
from fitune.train.stop_signals import stop_signals

# LoRA's usual rate for models of 7B to 13B (QLoRA, table 9); full fine-tuning wants about a twentieth of it.
# Preferences want less: TRL's own scripts take 5e-6 (dpo.py) and 8e-5 (orpo.py) with adapters, a tenth without;
# for kto without its guide says at most 1e-6.
LEARNING_RATES = {
    "supervised": {"qlora": 2e-4, "lora": 2e-4, "full": 1e-5},
    "dpo": {"qlora": 5e-6, "lora": 5e-6},
    "orpo": {"qlora": 8e-5, "lora": 8e-5, "full": 8e-6},
    "kto": {"qlora": 5e-6, "lora": 5e-6},
}

# Lion's paper: rates of a third to a tenth of AdamW's.
OPTIMIZER_RATES = {"lion": 0.2}
_JUDGED = {"loss": "validation loss", "score": "score"}
# Of rows that are counted, how many between two words of it.
WATCHED_ROWS = 256
# A checkpoint that found no room on the disk is tried again after so many steps.
RETRY_STEPS = 10
# Often enough to hold the heap's growth to a few per cent, seldom enough to cost none of the speed.
TRIM_EVERY_STEPS = 64


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl, without what is None. Rates in tokens per second, memory resident in bytes.

    `reward_accuracy`, `reward_margin`: of steps of preference pairs, as `StepResult` has them. `machine_share`: the
    rate of the step's products with weights, as a share of that of large products in the same format here.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    memory_bytes: int
    seconds: float
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    machine_share: float | None = None


@dataclass(frozen=True)
class ValidationRecord:
    """The objective on the validation set after a step: of supervised training its trained tokens' mean loss."""

    step: int
    validation_loss: float
    validation_reward_accuracy: float | None = None
    validation_reward_margin: float | None = None


Record = StepRecord | ValidationRecord | ScoreRecord
Watcher = Callable[[Record], None]


@dataclass(frozen=True)
class Rows:
    """The order in which a run sees its samples, resumable at any row.

    Attributes:
        samples: encoded.
        row_tokens: how many tokens a row holds.
        micro_batch: rows to a micro-batch; accumulation: micro-batches to a step.
        share: whether the beginnings that packed samples share lie in a row once.
        watch: is told how far counting is: of very many samples it takes minutes.
    """

    samples: Sequence[EncodedSample]
    row_tokens: int
    micro_batch: int
    accumulation: int
    seed: int
    pack: bool
    pad_id: int
    share: bool = True
    watch: Watch | None = field(default=None, repr=False, compare=False)
    _counts: dict[tuple[int, int], int] = field(default_factory=dict, repr=False, compare=False)

    def of(self, samples: Sequence[EncodedSample]) -> Rows:
        """Other samples, in rows of the same kind, one micro-batch to a step and nothing shared.

        Rows are as long as the samples that they were made for need; these may be longer.
        """
        longest = max(self.row_tokens, int(lengths_of(samples).max(initial=0)))
        return replace(self, row_tokens=longest, samples=samples, accumulation=1, share=False, watch=None, _counts={})

    def epoch(self, number: int) -> Iterator[list[Row]]:
        """The steps of an epoch, each so many rows; the last may be smaller."""
        rows = epoch_rows(self.samples, self.row_tokens, self.micro_batch, self.seed, number, self.pack, self.share)
        while step := list(islice(rows, self.micro_batch * self.accumulation)):
            yield step

    def count(self, number: int) -> int:
        """How many steps an epoch has."""
        known = (number, 0 if self.pack else self.micro_batch)  # packed rows do not know of micro-batches
        if known not in self._counts:
            rows = epoch_rows(
                self.samples, self.row_tokens, self.micro_batch, self.seed, number, self.pack, self.share
            )
            count = samples = 0
            for row in rows:
                count, samples = count + 1, samples + len(row.samples)
                if self.watch is not None and count % WATCHED_ROWS == 0:
                    self.watch(f"rows of epoch {number + 1}", samples)
            self._counts[known] = count
        return -(-self._counts[known] // (self.micro_batch * self.accumulation))

    def batches(self, rows: Sequence[Row]) -> list[Batch]:
        """The micro-batches of one step."""
        batches = []
        for start in range(0, len(rows), self.micro_batch):
            part = rows[start : start + self.micro_batch]
            samples = [[self.samples[index] for index in row.samples] for row in part]
            batches.append(collate(samples, self.row_tokens, self.pad_id, [row.shared for row in part]))
        return batches

    def first_batches(self) -> Iterator[Batch]:
        """The micro-batches of the first epoch in order, made one by one."""
        for step in self.epoch(0):
            yield from self.batches(step)

    def steps(self, epochs: float, limit: int | None) -> Iterator[tuple[float, list[Row]]]:
        """(epochs after the step, a part by the share of its samples, rows) for every step of the run."""
        left = count_steps(self, epochs, limit)
        for number in itertools.count():
            seen = 0
            for rows in self.epoch(number):
                if not left:
                    return
                left -= 1
                seen += sum(len(row.samples) for row in rows)
                yield number + seen / len(self.samples), rows
            if not seen:
                return


def learning_rate(config: RunConfig) -> float:
    """The run file's peak rate, or the usual one of its objective, method and optimizer."""
    usual = LEARNING_RATES[config.train.objective][config.method]
    return config.train.learning_rate or usual * OPTIMIZER_RATES.get(config.train.optimizer, 1.0)


def count_steps(rows: Rows, epochs: float, limit: int | None) -> int:
    """How many optimizer steps the run takes."""
    if limit is not None:
        return limit
    whole = math.floor(epochs + 1e-9)
    total = sum(rows.count(number) for number in range(whole))
    part = epochs - whole
    return total + math.ceil(rows.count(whole) * part - 1e-9) if part > 1e-9 else total


def validate(
    model: FusedModel, samples: Sequence[EncodedSample], rows: Rows, objective: Objective = SUPERVISED
) -> Measured:
    """The objective's value on `samples`; leaves the model as it found it."""
    whole = rows.of(samples)
    was_training = model.graph.training
    model.graph.eval()
    found = measure(model, (batch for step in whole.epoch(0) for batch in whole.batches(step)), objective)
    model.graph.train(was_training)
    return found


def run_loop(
    config: RunConfig, model: FusedModel, rows: Rows, validation: Sequence[EncodedSample], folder: RunFolder,
    identity: Mapping[str, str], resume_from: Any = None, watch: Watcher | None = None,
    say: Callable[[str], None] = lambda line: None, budget_bytes: int | None = None, ranks: Ranks = ALONE,
    scorer: Scorer | None = None,
) -> Progress:  # fmt: skip
    """Trains to the end of the run; returns how far it came. `budget_bytes`: what the process should stay within.
    `scorer`: where the run file asks for scores on the way.
    Of several `ranks` the first one alone writes; `watch` and `say` hear the same in all of them.

    Writes metrics.jsonl and checkpoints. On SIGINT or SIGTERM it finishes the step, saves a checkpoint and raises
    Interrupted, which says how to go on; MemoryShortError where the next step may not find the memory it needs;
    DiskFullError where the disk has no room for a checkpoint, or for the optimizer's states.
    """
    settings = config.train
    optimizer = make_optimizer(
        settings.optimizer,
        parameter_groups(model.graph.named_parameters(), settings.weight_decay, config.lora.b_rate_ratio),
        settings.betas, settings.weight_decay, model.backend,
        folder.path if settings.optimizer_states == "disk" else None,
    )  # fmt: skip
    try:
        memory = MemoryWatch(budget_bytes=budget_bytes)
        return _take_steps(
            config, model, optimizer, rows, validation, folder, identity, resume_from, watch, say, memory, ranks,
            scorer,
        )  # fmt: skip
    finally:
        rooms.clear()
        close(optimizer)


def _take_steps(
    config: RunConfig, model: FusedModel, optimizer: torch.optim.Optimizer, rows: Rows,
    validation: Sequence[EncodedSample], folder: RunFolder, identity: Mapping[str, str], resume_from: Any,
    watch: Watcher | None, say: Callable[[str], None], memory: MemoryWatch, ranks: Ranks,
    scorer: Scorer | None,
) -> Progress:  # fmt: skip
    settings = config.train
    steps = count_steps(rows, settings.epochs, settings.steps)
    schedule, objective = schedule_of(config, steps), objective_for(settings)
    progress = Progress()
    if resume_from is not None:
        progress = load_checkpoint(resume_from, model, optimizer, ranks.rank)
    else:
        torch.manual_seed(ranks.seed(config.seed))
    judge = EarlyStopping(
        settings.early_stopping_patience, settings.early_stopping_min_delta, settings.best_by == "score"
    )
    by_loss = EarlyStopping() if judge.by_score else judge
    _trim_metrics(folder, progress.step, judge, by_loss, ranks)
    spikes, stalls = SpikeWatch(), StallWatch(say)
    machine = MachineShare(model, settings.recompute == "layers", objective.forwards)
    saver = _Saver(folder, model, optimizer, identity, settings.keep_checkpoints, say, ranks)
    lately: deque[float] = deque(maxlen=settings.validate_every_steps or 1)

    with stop_signals() as received, closing(PatientFile(folder.metrics_file, say)) as metrics:

        def record(entry: Record) -> None:
            facts = {name: value for name, value in asdict(entry).items() if value is not None}
            if ranks.is_first:
                metrics.write(f"{json.dumps(facts)}\n".encode())
            if watch is not None:
                watch(entry)

        start = time.perf_counter() - progress.seconds
        for number, (epoch, step_rows) in enumerate(rows.steps(settings.epochs, settings.steps)):
            if number < progress.step:
                continue
            if judge.is_over:
                break
            begun = time.perf_counter()
            rate = schedule.rate(number) * progress.rate_ratio
            batches = rows.batches(step_rows)
            try:
                with stalls.step(number + 1):
                    result = update(model, batches, optimizer, rate, settings.max_grad_norm, objective, ranks)
            except NonFiniteError as error:
                where = place_of(model, batches, error)
                told = f"step {number + 1}: {error}; no weight was changed; {where}. {_data_of(rows, step_rows)}"
                progress = _after_non_finite(settings, progress, number, told, folder, model, optimizer, say, ranks)
                result = None
            now = time.perf_counter()
            progress = replace(progress, step=number + 1, seconds=now - start)
            if result is not None:
                progress = replace(
                    progress, tokens=progress.tokens + result.tokens,
                    trained_tokens=progress.trained_tokens + result.trained_tokens,
                )  # fmt: skip
                record(
                    StepRecord(
                        number + 1,
                        round(epoch, 4),
                        result.loss,
                        result.grad_norm,
                        rate,
                        result.tokens,
                        result.trained_tokens,
                        result.tokens / (now - begun),
                        resident_bytes(),
                        round(progress.seconds, 3),
                        result.reward_accuracy,
                        result.reward_margin,
                        machine.share(result.tokens, result.trained_tokens, (now - begun) * ranks.count),
                    )
                )
                lately.append(result.loss)
                usual = spikes.hear(result.loss)
                if usual is not None:
                    say(_spike_sentence(number + 1, result.loss, usual, model, rows, step_rows, objective))
            # With states on disk steps are slow and memory is short: every time.
            if progress.step % TRIM_EVERY_STEPS == 0 or settings.optimizer_states == "disk":
                give_back_free_memory()
            last = progress.step == steps
            if len(validation) and (last or _due(progress.step, settings.validate_every_steps)):
                held_out = validate(model, validation, rows, objective)
                loss = held_out.loss
                record(ValidationRecord(progress.step, loss, held_out.reward_accuracy, held_out.reward_margin))
                train_loss = math.fsum(lately) / len(lately) if lately else math.nan
                if by_loss.hear(progress.step, loss, train_loss) and settings.restore_best and not judge.by_score:
                    saver.save_best(progress.step, loss)
                rising = by_loss.overfitting(loss, train_loss)
                if rising is not None:
                    say(f"warning: {rising}")
            ends = judge.is_over and not last  # by its loss
            if scorer is not None and (last or ends or _due(progress.step, settings.score_every_steps)):
                scored = scorer.score(model, progress.step)
                record(scored)
                if judge.by_score and judge.hear(progress.step, scored.score) and settings.restore_best:
                    saver.save_best(progress.step, scored.score, "score")
            if judge.is_over and not last:
                say(judge.why())
                last = True
            saved = f"everything is saved. Go on with: fitune train {folder.config_file} --resume"
            if ranks.any(bool(received)) and not last:
                saver.save(progress, must=True)
                raise Interrupted(f"stopped after step {progress.step} of {steps}; {saved}")
            short = None if last else memory.look()
            if ranks.any(short is not None and short.must_stop):
                saver.save(progress, must=True)
                why = short or "another process finds too little memory"
                raise MemoryShortError(f"stopped after step {progress.step} of {steps}: {why}; {saved}")
            for warning in (short, memory.over_budget()):
                if warning is not None:
                    say(f"warning: {warning}")
            if last or _due(progress.step, settings.save_every_steps) or saver.is_due(progress.step):
                saver.save(progress)
            if last:
                break
    ranks.any(False)  # the first one has written all of it
    if settings.restore_best and (step := best_step(folder.best)) not in (None, progress.step):
        take_best(folder.best, model)
        say(f"the result is the model after step {step}, whose {_JUDGED[settings.best_by]} was the best")
    return progress


def objective_for(settings: TrainSettings) -> Objective:
    """The run's objective."""
    return objective_of(settings.objective, settings.beta, settings.good_weight, settings.bad_weight)


def schedule_of(config: RunConfig, steps: int) -> Schedule:
    """The run's learning rates."""
    settings = config.train
    return Schedule(
        settings.schedule, learning_rate(config), steps, settings.warmup_share, settings.warmup_steps,
        settings.final_rate_share, settings.schedule_power, settings.schedule_cycles,
    )  # fmt: skip


class _Saver:
    """Writes checkpoints; a full disk ends no run that can go on: it is said, and tried again."""

    def __init__(
        self, folder: RunFolder, model: FusedModel, optimizer: torch.optim.Optimizer, identity: Mapping[str, str],
        keep: int, say: Callable[[str], None], ranks: Ranks,
    ) -> None:  # fmt: skip
        self._ranks = ranks
        self._folder, self._model, self._optimizer = folder, model, optimizer
        self._identity, self._keep, self._say = identity, keep, say
        self._again: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint that found no room is tried again now."""
        return self._again is not None and step >= self._again

    def save(self, progress: Progress, must: bool = False) -> None:
        """A checkpoint. Raises DiskFullError where it `must` be written and finds no room."""
        self._ranks.check_equal(self._model.trainable)
        randoms = self._ranks.each(torch.get_rng_state())
        full: DiskFullError | None = None
        if self._ranks.is_first:
            try:
                save_checkpoint(
                    self._folder.checkpoints, self._model, self._optimizer, progress, self._identity, self._keep,
                    randoms,
                )  # fmt: skip
            except DiskFullError as error:
                full = error
        self._again = None
        if self._ranks.any(full is not None):
            kept = list_checkpoints(self._folder.checkpoints)
            newest = f"the newest checkpoint is {kept[-1].name}" if kept else "there is no checkpoint yet"
            why = full or f"{self._folder.checkpoints}: no room for a checkpoint"
            if must:
                raise DiskFullError(f"{why}; {newest}") from full
            self._again = progress.step + RETRY_STEPS
            self._say(f"warning: {why}; {newest}. Training goes on, and tries again after step {self._again}")

    def save_best(self, step: int, value: float, name: str = "validation_loss") -> None:
        """The trained weights of the best validation, or score, so far."""
        if not self._ranks.is_first:
            return
        try:
            save_best(self._folder.best, self._model, step, value, name)
        except DiskFullError as error:
            self._say(f"warning: {error}; the best model so far is one of an earlier step")


def _after_non_finite(
    settings: TrainSettings, progress: Progress, number: int, told: str, folder: RunFolder, model: FusedModel,
    optimizer: torch.optim.Optimizer, say: Callable[[str], None], ranks: Ranks,
) -> Progress:  # fmt: skip
    """What the run file says is done after such a step. Raises FituneError where the run must stop."""
    count = progress.non_finite + 1
    if settings.on_non_finite == "stop" or count > settings.non_finite_limit:
        why = "" if settings.on_non_finite == "stop" else f" ({settings.non_finite_limit} such steps are allowed)"
        raise FituneError(f"{told} A lower train.learning_rate usually helps{why}")
    if settings.on_non_finite == "skip":
        say(f"warning: {told} The step is skipped")
        return replace(progress, non_finite=count)
    # One that was written because the run was stopped would not be there in a run that nobody stopped.
    newest, damaged = newest_whole(folder.checkpoints, settings.save_every_steps or 1)
    for sentence in damaged:
        say(f"{sentence}; it is not used")
    back = "The weights stay: there is no checkpoint to go back to"
    if newest is not None:
        load_checkpoint(newest, model, optimizer, ranks.rank)
        back = f"The weights are those of {newest.name} again"
    ratio = 0.5 * progress.rate_ratio
    say(f"warning: {told} {back}; the learning rate is {ratio:g} of the schedule's from now on")
    return replace(progress, non_finite=count, rate_ratio=ratio)


def _data_of(rows: Rows, step_rows: Sequence[Row]) -> str:
    where = sorted({str(rows.samples[index].origin) for row in step_rows for index in row.samples})[:8]
    return f"The step's data began with: {', '.join(where)}."


def _spike_sentence(
    step: int, loss: float, usual: float, model: FusedModel, rows: Rows, step_rows: Sequence[Row],
    objective: Objective,
) -> str:  # fmt: skip
    samples = [rows.samples[index] for row in step_rows for index in row.samples]
    found = worst_samples(model, samples, rows.row_tokens, objective)
    worst = ", ".join(f"{one.origin} ({one.loss:.2f})" for one in found)
    return (
        f"warning: the loss of step {step}, {loss:.3f}, stands out from {usual:.3f} before it. The samples with the "
        f"highest loss in it: {worst}"
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _trim_metrics(folder: RunFolder, step: int, judge: EarlyStopping, by_loss: EarlyStopping, ranks: Ranks) -> None:
    """Drops the lines of steps that will be taken again; validations and scores that stay are heard once more."""
    text = folder.metrics_file.read_text() if folder.metrics_file.is_file() else None
    ranks.any(False)  # all have read it
    lines = [line for line in (text or "").splitlines() if line.strip().endswith("}")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    for entry in map(json.loads, kept):
        if "validation_loss" in entry:
            by_loss.hear(entry["step"], entry["validation_loss"])
        if "score" in entry and judge.by_score:
            judge.hear(entry["step"], entry["score"])
    if text is not None and ranks.is_first:
        write_text(folder.metrics_file, "".join(f"{line}\n" for line in kept))
