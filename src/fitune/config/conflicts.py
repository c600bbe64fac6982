"""Fields of a run file that are right one by one and cannot stand together, or would have no effect."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fitune.config.schema import RunConfig


class Conflict(NamedTuple):
    """A field that cannot stand beside others: its name (`train.steps`), the others' names, what to do."""

    field: str
    beside: tuple[str, ...]
    sentence: str


class CombinationError(ValueError):
    """Fields that are right one by one and cannot stand together."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        self.conflicts = conflicts
        super().__init__("; ".join(f"{conflict.field}: {conflict.sentence}" for conflict in conflicts))


def accumulation_for(tokens_per_step: int, row_tokens: int, micro_batch: int) -> int:
    """How many micro-batches make a step of about so many tokens."""
    return max(1, round(tokens_per_step / (row_tokens * micro_batch)))


def conflicts(config: RunConfig) -> Iterator[Conflict]:
    """Fields that contradict each other, or that would have no effect."""
    data, train, evaluate = config.data, config.train, config.evaluate
    if config.method == "full":
        for name in sorted(config.lora.model_fields_set):
            yield Conflict(
                f"lora.{name}",
                ("method",),
                "method full has no adapter; remove this, or take method lora or qlora",
            )
        if train.compute == "int8":
            yield Conflict(
                "train.compute",
                ("method",),
                "int8 is for frozen weights, and method full has none; take auto, or method lora or qlora",
            )
    if config.method == "auto" and config.lora.start_from is not None:
        yield Conflict("lora.start_from", ("method",), "say which base it is for: method lora or qlora")
    if config.method == "auto" and config.lora.modules_to_save:
        yield Conflict(
            "lora.modules_to_save", ("method",), "layers in 4 bits cannot be trained whole: say method lora or qlora"
        )
    if config.lora.initial == "loftq":
        if config.method in ("lora", "auto"):
            yield Conflict(
                "lora.initial",
                ("method",),
                "loftq makes up for what a base loses to 4 bits: take method qlora, or initial zero",
            )
        if config.lora.start_from is not None:
            yield Conflict(
                "lora.initial", ("lora.start_from",), "the adapter that is gone on from is not begun anew; remove one"
            )
        if train.objective in ("dpo", "kto"):
            yield Conflict(
                "lora.initial",
                ("train.objective",),
                f"{train.objective} compares with the base without its adapter, and loftq's is a part of the base; "
                "take initial zero",
            )
    if train.resident_layers is not None and config.method not in ("qlora", "auto"):
        yield Conflict(
            "train.resident_layers",
            ("method",),
            "only weights in 4 bits are read from the disk as they are needed; remove this, or take method qlora",
        )
    if train.compute == "int8" and config.lora.dropout > 0:
        yield Conflict(
            "train.compute",
            ("lora.dropout",),
            "int8 does not cover dropout; take auto, or lora.dropout 0",
        )
    if train.steps is not None and "epochs" in train.model_fields_set:
        yield Conflict("train.steps", ("train.epochs",), "given together with train.epochs; keep one of them")
    if train.validate_every_steps is not None and data.validation is None:
        yield Conflict(
            "train.validate_every_steps",
            ("data.validation",),
            "there is nothing to validate on; give data.validation a file or a share such as 0.05",
        )
    if train.tokens_per_step is not None:
        at_once = data.max_tokens * train.micro_batch
        if train.accumulation not in (1, accumulation_for(train.tokens_per_step, data.max_tokens, train.micro_batch)):
            yield Conflict(
                "train.tokens_per_step",
                ("train.accumulation",),
                "given together with train.accumulation; keep one of them",
            )
        elif train.tokens_per_step < at_once:
            yield Conflict(
                "train.tokens_per_step",
                ("train.micro_batch", "data.max_tokens"),
                f"one micro-batch alone has {at_once} tokens ({train.micro_batch} rows of {data.max_tokens}); "
                "lower train.micro_batch, or give more",
            )
    if train.optimizer == "adafactor" and train.optimizer_states == "disk":
        yield Conflict(
            "train.optimizer_states",
            ("train.optimizer",),
            "adafactor looks at whole matrices, and its states are small: leave them in memory",
        )
    if train.optimizer == "adafactor" and train.betas is not None:
        yield Conflict("train.betas", ("train.optimizer",), "has no effect: adafactor has no such rates; remove it")
    fields = type(train).model_fields
    if train.objective in ("dpo", "kto") and config.method == "full":
        yield Conflict(
            "train.objective",
            ("method",),
            f"{train.objective} compares with the base, which method full changes; take method lora or qlora, or "
            "objective orpo",
        )
    if train.objective in ("dpo", "kto"):
        for name, set_here in (("compute", train.compute == "int8"), ("neftune_alpha", bool(train.neftune_alpha))):
            if set_here:
                yield Conflict(
                    f"train.{name}",
                    ("train.objective",),
                    f"{train.objective} compares the model with its base, which would be computed without it, so "
                    "that the two differ before anything is learnt; remove it",
                )
    if train.objective == "supervised" and train.beta != fields["beta"].default:
        yield Conflict(
            "train.beta", ("train.objective",), "has no effect on supervised training; it is of dpo, orpo, kto"
        )
    for name in ("good_weight", "bad_weight"):
        if train.objective != "kto" and getattr(train, name) != fields[name].default:
            yield Conflict(f"train.{name}", ("train.objective",), f"has no effect on {train.objective}; it is of kto")
    if train.objective != "supervised" and data.train_on != type(data).model_fields["train_on"].default:
        yield Conflict(
            "data.train_on",
            ("train.objective",),
            "has no effect on pairs and judged answers: of these the answer is trained",
        )
    for name, kind in (("schedule_power", "polynomial"), ("schedule_cycles", "cosine_restarts")):
        if getattr(train, name) != fields[name].default and train.schedule != kind:
            yield Conflict(
                f"train.{name}", ("train.schedule",), f"has no effect on schedule {train.schedule}; it is of {kind}"
            )
    if train.schedule == "constant" and train.final_rate_share:
        yield Conflict(
            "train.final_rate_share", ("train.schedule",), "has no effect: the rate of schedule constant never falls"
        )
    if train.warmup_steps is not None and train.warmup_share != fields["warmup_share"].default:
        yield Conflict(
            "train.warmup_steps", ("train.warmup_share",), "given together with train.warmup_share; keep one of them"
        )
    if train.warmup_steps is not None and train.steps is not None and train.warmup_steps >= train.steps:
        yield Conflict(
            "train.warmup_steps",
            ("train.steps",),
            f"the run has {train.steps} steps, so the learning rate would never reach its peak; give fewer",
        )
    yield from _scoring_conflicts(config)
    for name in ("early_stopping_patience", "restore_best"):
        if getattr(train, name) and train.best_by == "loss" and train.validate_every_steps is None:
            yield Conflict(
                f"train.{name}",
                ("train.validate_every_steps",),
                "needs validations on the way; set train.validate_every_steps, and data.validation",
            )
    if train.early_stopping_min_delta and train.early_stopping_patience is None and not train.restore_best:
        yield Conflict(
            "train.early_stopping_min_delta",
            ("train.early_stopping_patience",),
            "has no effect without train.early_stopping_patience or train.restore_best",
        )
    if train.on_non_finite == "stop" and train.non_finite_limit != fields["non_finite_limit"].default:
        yield Conflict(
            "train.non_finite_limit", ("train.on_non_finite",), "has no effect: such a step ends the run at once"
        )
    for number, source in enumerate(data.train):
        if source.share is not None and source.weight != 1:
            yield Conflict(
                f"data.train[{number}].share",
                (f"data.train[{number}].weight",),
                "given together with a weight; keep one of them",
            )
    if data.replay is None and data.replay_share != type(data).model_fields["replay_share"].default:
        yield Conflict("data.replay_share", ("data.replay",), "has no effect without data.replay; give it a file")
    if isinstance(data.validation, str) and os.path.realpath(data.validation) in [
        os.path.realpath(source.path) for source in data.train
    ]:
        yield Conflict(
            "data.validation",
            ("data.train",),
            f"{data.validation} is training data too; give another file, or a share such as 0.05 to hold out",
        )
    if evaluate.task == "none":
        for name in ("data", "database"):
            if getattr(evaluate, name) is not None:
                yield Conflict(
                    f"evaluate.{name}",
                    ("evaluate.task",),
                    "has no effect with task none; set evaluate.task or remove this",
                )
    elif evaluate.data is None and data.validation is None:
        yield Conflict(
            "evaluate.task",
            ("evaluate.data", "data.validation"),
            f"{evaluate.task} needs questions; give evaluate.data a file, or set data.validation",
        )
    if evaluate.task == "sql" and evaluate.database is None:
        yield Conflict(
            "evaluate.task",
            ("evaluate.database",),
            "sql needs evaluate.database, the SQLite file the answers are run on",
        )
    if evaluate.task in ("text", "perplexity") and evaluate.database is not None:
        yield Conflict(
            "evaluate.database",
            ("evaluate.task",),
            f"only task sql runs on a database, not {evaluate.task}; remove this",
        )


def _scoring_conflicts(config: RunConfig) -> Iterator[Conflict]:
    """Of scores while training."""
    train = config.train
    if train.score_every_steps is not None and config.data.validation is None:
        yield Conflict(
            "train.score_every_steps",
            ("data.validation",),
            "there are no questions to answer; give data.validation a file or a share such as 0.05",
        )
    if train.score_every_steps is not None and config.evaluate.task == "perplexity":
        yield Conflict(
            "train.score_every_steps",
            ("evaluate.task",),
            "perplexity is the validation loss in other words: take train.validate_every_steps, or task sql or text",
        )
    if train.score_every_steps is None and train.score_samples != type(train).model_fields["score_samples"].default:
        yield Conflict(
            "train.score_samples", ("train.score_every_steps",), "has no effect without train.score_every_steps"
        )
    if train.best_by == "score" and train.score_every_steps is None:
        yield Conflict(
            "train.best_by", ("train.score_every_steps",), "score needs scores; set train.score_every_steps"
        )
    elif train.best_by == "score" and train.early_stopping_patience is None and not train.restore_best:
        yield Conflict(
            "train.best_by",
            ("train.early_stopping_patience",),
            "has no effect without train.early_stopping_patience or train.restore_best",
        )
