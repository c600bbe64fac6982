"""The task metric while a run trains: the first validation questions, answered by the model as it is now, scored."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fitune.config.schema import RunConfig
from fitune.data.conversation import Sample
from fitune.data.dataset import TrainingData, original_samples, read_validation_file
from fitune.data.encoding import encode_prompt, with_system
from fitune.errors import FituneError, InputError
from fitune.evaluate.task_evaluation import SCORES, check_samples, evaluate_task
from fitune.fuse.model import FusedModel
from fitune.generate.slot_generation import shared_prefix_tokens
from fitune.generate.stopping import stop_ids
from fitune.kernels.rooms import rooms
from fitune.models.positions import positions_of
from fitune.models.source import ModelSource
from fitune.plan.answering import Answering
from fitune.step.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHERE = "train.score_every_steps"


@dataclass(frozen=True)
class ScoreRecord:
    """The answers after a step, scored; one line of metrics.jsonl.

    Attributes:
        score: the first of the task's scores, by which best_by judges; score_of: its name, a key of `SCORES`.
        score_low, score_high: the interval that holds it (95 %).
        scores: all of them by name.
        score_samples: how many questions were answered; unfinished: answers stopped at evaluate.max_new_tokens.
        score_seconds: wall time.
    """

    step: int
    score: float
    score_of: str
    score_low: float
    score_high: float
    scores: Mapping[str, float]
    score_samples: int
    unfinished: int
    score_seconds: float


@dataclass(frozen=True)
class Questions:
    """What a run's scores are computed on.

    Attributes:
        samples: questions with their reference answers.
        task: how the answers are scored.
        answering: the sizes of answering them, for the plan.
    """

    samples: tuple[Sample, ...]
    task: Literal["sql", "text"]
    answering: Answering


def questions_of(
    config: RunConfig, source: ModelSource, data: TrainingData, tokenizer: PreTrainedTokenizerBase
) -> Questions | None:
    """The first `train.score_samples` validation questions, in the files' order; None where no scores are asked for.

    Plain text, and answers that were judged bad, are passed over; of preference pairs the better answer is the
    reference.

    Raises InputError, before anything is trained, for data without questions, for questions that are too long for the
    model, for references that the task cannot be done with.
    """
    train, settings = config.train, config.evaluate
    if train.score_every_steps is None:
        return None
    if not len(data.validation):
        raise InputError("there are no validation data, so no questions to answer", where=_WHERE)
    samples = tuple(islice(_questions(config, data), train.score_samples))
    if not samples:
        raise InputError(
            "the validation data hold no questions with answers (plain text has none, nor do answers that are "
            "labelled bad count); leave it out: the validation loss is what there is to measure",
            where=_WHERE,
        )
    task: Literal["sql", "text"] = "sql" if settings.task == "sql" else "text"
    check_samples(samples, task, None if settings.database is None else Path(settings.database))
    prompts = [encode_prompt(with_system(sample.messages[:-1], config.data.system), tokenizer) for sample in samples]
    longest = max(map(len, prompts))
    limit = positions_of(source.config)
    if limit is not None and longest + settings.max_new_tokens > limit:
        worst = samples[[len(prompt) for prompt in prompts].index(longest)]
        raise InputError(
            f"{worst.origin}: this question has {longest} tokens, and with {settings.max_new_tokens} new ones "
            f"(evaluate.max_new_tokens) it outgrows the model's {limit} positions",
            where=_WHERE,
        )
    shared = shared_prefix_tokens(prompts)
    rows = min(settings.batch, len(samples))
    return Questions(samples, task, Answering(rows, shared, longest - shared, settings.max_new_tokens))


def _questions(config: RunConfig, data: TrainingData) -> Iterator[Sample]:
    from_file = isinstance(config.data.validation, str)
    held_out = read_validation_file(config.data) if from_file else original_samples(data, data.validation)
    for sample in held_out:
        if sample.text is None and sample.label is not False:
            yield replace(sample, rejected=(), label=None)


class Scorer:
    """Answers and scores, and leaves the model, and what is drawn at random, as they were.

    Args:
        ranks: of several processes the first one answers; the others wait, and take its scores.
    """

    def __init__(self, config: RunConfig, source: ModelSource, questions: Questions, ranks: Ranks = ALONE) -> None:
        self._config, self._questions, self._ranks = config, questions, ranks
        self._tokenizer = source.tokenizer()
        self._stops = stop_ids(source, self._tokenizer)

    def score(self, model: FusedModel, step: int) -> ScoreRecord:
        """The scores of `model` after a step. Raises FituneError, in all processes, where it cannot answer."""
        told = ""
        if self._ranks.is_first:
            try:
                told = json.dumps(self._measured(model))
            except FituneError as error:
                told = json.dumps({"error": str(error)})
        found = json.loads(self._ranks.told(told))
        if "error" in found:
            raise FituneError(f"the answers after step {step} cannot be scored: {found['error']}")
        return ScoreRecord(step, **found)

    def _measured(self, model: FusedModel) -> dict[str, Any]:
        settings, questions = self._config.evaluate, self._questions
        begun = time.perf_counter()
        rooms.clear()  # a step's memory: answers must not come on top of it
        with torch.random.fork_rng(devices=[]):
            found = evaluate_task(
                model, self._tokenizer, questions.samples, questions.task, eos_ids=self._stops,
                database=None if settings.database is None else Path(settings.database),
                system=self._config.data.system, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch,
            )  # fmt: skip
        name, first = next(iter(found.scores.items()))
        return {
            "score": first.value, "score_of": name, "score_low": first.low, "score_high": first.high,
            "scores": {other: interval.value for other, interval in found.scores.items()},
            "score_samples": found.samples, "unfinished": found.unfinished,
            "score_seconds": round(time.perf_counter() - begun, 3),
        }  # fmt: skip


def score_in_words(facts: Mapping[str, Any]) -> str:
    """Of a line of metrics.jsonl: `execution accuracy 42.0 % (29.1 to 55.9) on 50 answers`."""
    title, scale, _ = SCORES[facts["score_of"]]
    by, unit = (100.0, " %") if scale == "share" else (1.0, "")
    value, low, high = (by * float(facts[name]) for name in ("score", "score_low", "score_high"))
    return f"{title} {value:.1f}{unit} ({low:.1f} to {high:.1f}) on {facts['score_samples']} answers"
