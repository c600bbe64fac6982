"""A model's results on a task: answers generated and scored, or the loss on given answers; base against tuned."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from fitune.data.collation import collate
from fitune.data.conversation import Sample
from fitune.data.encoding import EncodedSample, TrainOn, encode, encode_prompt, with_system
from fitune.errors import FituneError, InputError
from fitune.evaluate.intervals import (
    Interval,
    PairedDifference,
    Rows,
    bootstrap_interval,
    paired_difference,
    proportion_interval,
)
from fitune.evaluate.sql_execution import QueryTimeoutError, SqlOutcome, execution_accuracy, extract_sql, run_query
from fitune.evaluate.text_scores import compare_texts, text_scores
from fitune.fuse.model import FusedModel
from fitune.generate import generate_detailed
from fitune.generate.forward_call import undisturbed
from fitune.generate.generation import GenerationStats, Progress
from fitune.generate.stopping import pad_id
from fitune.process_memory import give_back_free_memory
from fitune.quant.lease import lease_for_generation, leased

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Task = Literal["sql", "text", "perplexity"]
TASKS: tuple[Task, ...] = ("sql", "text", "perplexity")
Scale = Literal["share", "number"]
# How each score is read: its name for people, 0 to 1 or as it is, and where better lies.
SCORES: dict[str, tuple[str, Scale, Literal["higher", "lower"]]] = {
    "execution_accuracy": ("execution accuracy", "share", "higher"),
    "bleu": ("BLEU", "number", "higher"),
    "chrf": ("chrF", "number", "higher"),
    "rouge_l": ("ROUGE-L", "share", "higher"),
    "exact_match": ("exact match", "share", "higher"),
    "loss": ("loss (nats a trained token)", "number", "lower"),
    "perplexity": ("perplexity", "number", "lower"),
}
# Tokens of one forward pass of the loss: bounds its activations.
LOSS_BATCH_TOKENS = 4096
SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample's answer.

    Attributes:
        question: the last turn before the answer; reference: the sample's own answer.
        text: what the model wrote (task sql: the query taken out of it).
        finished: whether the model ended by itself, not at `max_new_tokens`.
        outcome: of task sql; its `message` says why it is not correct.
    """

    question: str
    reference: str
    text: str
    finished: bool
    outcome: SqlOutcome | None = None


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """What `evaluate_task` found.

    Attributes:
        scores: name (a key of `SCORES`) -> score with its interval.
        signatures: name -> what is needed to compute the same number elsewhere.
        answers: of tasks sql and text, in the samples' order.
        losses: of task perplexity: [n, 2], each sample's summed loss in nats and its trained tokens.
        new_tokens: generated; unfinished: answers stopped at `max_new_tokens`.
        seconds: wall time.
    """

    task: Task
    scores: dict[str, Interval]
    samples: int
    seconds: float
    signatures: dict[str, str] = field(default_factory=dict)
    answers: tuple[Answer, ...] = ()
    losses: Rows | None = None
    new_tokens: int = 0

    @property
    def unfinished(self) -> int:
        return sum(not answer.finished for answer in self.answers)


def evaluate_task(
    model: FusedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    task: Task,
    *,
    eos_ids: Sequence[int],
    database: Path | None = None,
    system: str | None = None,
    train_on: TrainOn = "assistant",
    max_new_tokens: int = 128,
    batch_size: int = 16,
    with_adapter: bool = True,
    on_progress: Progress | None = None,
) -> TaskEvaluation:
    """A model and samples whose last turn is the reference answer -> its scores on the task.

    sql: the answers' queries are run on `database`: execution accuracy. text: BLEU, chrF, ROUGE-L, exact match.
    perplexity: the mean loss over the trained tokens, and its exponential. Greedy; the model is left as found.

    Args:
        eos_ids: where answers end (`generate.stopping.stop_ids`).
        system: replaces the samples' system message (None: their own).
        train_on: whose tokens count for perplexity.
        with_adapter: False: the base model's results, the adapter switched off meanwhile.

    Raises:
        InputError: no samples; samples without question or answer; a database that cannot be read; references
            that are no queries of this database. Everything is checked before anything is generated.
    """
    check_samples(samples, task, database)
    begun = time.perf_counter()
    with undisturbed(model.graph), _adapter(model, with_adapter):
        if task == "perplexity":
            encoded = [encode(sample, tokenizer, train_on, system) for sample in samples]
            losses = _losses(model, encoded, pad_id(tokenizer), batch_size)
            scores = {
                "loss": bootstrap_interval(losses, _mean_loss),
                "perplexity": bootstrap_interval(losses, lambda sums: math.exp(min(700.0, _mean_loss(sums)))),
            }
            return TaskEvaluation(task, scores, len(samples), time.perf_counter() - begun, losses=losses)
        prompts = [with_system(sample.messages[:-1], system) for sample in samples]
        references = [sample.messages[-1].content.strip() for sample in samples]
        last = GenerationStats(0)

        def progressed(stats: GenerationStats) -> None:
            nonlocal last
            last = stats
            if on_progress is not None:
                on_progress(stats)

        give_back_free_memory()
        with leased(model.graph, lease_for_generation(model.backend, model.dtype, model.stream is not None)):
            generations = generate_detailed(
                model.graph, [encode_prompt(prompt, tokenizer) for prompt in prompts], max_new_tokens=max_new_tokens,
                eos_ids=eos_ids, pad_id=pad_id(tokenizer), batch_size=batch_size, on_progress=progressed,
            )  # fmt: skip
    give_back_free_memory()
    texts = [tokenizer.decode(found.tokens, skip_special_tokens=True).strip() for found in generations]
    outcomes: Sequence[SqlOutcome | None] = [None] * len(texts)
    signatures = {}
    if task == "sql":
        assert database is not None
        texts = [extract_sql(text) for text in texts]
        judged = execution_accuracy(texts, references, database)
        outcomes = judged.outcomes
        scores = {"execution_accuracy": proportion_interval(judged.correct, len(texts))}
    else:
        measured = text_scores(texts, references)
        scores = {name: score.interval for name, score in measured.items()}
        signatures = {name: score.signature for name, score in measured.items()}
    answers = tuple(
        Answer(prompt[-1].content, reference, text, found.finished, outcome)
        for prompt, reference, text, found, outcome in zip(
            prompts, references, texts, generations, outcomes, strict=True
        )
    )
    return TaskEvaluation(
        task, scores, len(samples), time.perf_counter() - begun, signatures, answers,
        new_tokens=sum(len(found.tokens) for found in generations),
    )  # fmt: skip


def compare_evaluations(base: TaskEvaluation, tuned: TaskEvaluation) -> dict[str, PairedDifference]:
    """Two models' results on the same samples -> score name -> second minus first, paired by sample."""
    if base.task != tuned.task or base.samples != tuned.samples:
        raise FituneError("only results on the same task and the same samples can be compared")
    if tuned.task == "perplexity":
        assert base.losses is not None
        assert tuned.losses is not None
        return {
            "loss": paired_difference(base.losses, tuned.losses, _mean_loss),
            "perplexity": paired_difference(base.losses, tuned.losses, lambda sums: math.exp(_mean_loss(sums))),
        }
    if tuned.task == "sql":
        return {"execution_accuracy": paired_difference(correct_of(base), correct_of(tuned))}
    return compare_texts(
        [answer.text for answer in base.answers],
        [answer.text for answer in tuned.answers],
        [answer.reference for answer in tuned.answers],
    )


def correct_of(evaluation: TaskEvaluation) -> list[bool]:
    """Of task sql: which answers are correct."""
    return [answer.outcome is not None and answer.outcome.is_correct for answer in evaluation.answers]


def check_samples(samples: Sequence[Sample], task: Task | Literal["none"], database: Path | None) -> None:
    """Raises one InputError for all samples that the task cannot be done with."""
    if not samples:
        raise InputError("there are no samples to evaluate on")
    if task in ("perplexity", "none"):
        return
    problems = []
    for sample in samples:
        where = sample.origin or "a sample"
        if sample.text is not None:
            problems.append(f"{where}: plain text holds no question; only task perplexity takes it")
        elif len(sample.messages) < 2 or sample.messages[-1].role != "assistant":
            problems.append(f"{where}: a question and an answer of the assistant after it are needed")
    if task == "sql" and database is None:
        problems.append("task sql needs the SQLite database that the answers are run on (--database)")
    if task == "sql" and not problems:
        assert database is not None
        for sample in samples:
            try:
                run_query(database, sample.messages[-1].content.strip(), row_limit=1)
            except (sqlite3.Error, sqlite3.Warning, ValueError, QueryTimeoutError) as error:
                where = sample.origin or "a sample"
                problems.append(f"{where}: the answer is no query that runs on {database.name}: {error}")
    if problems:
        rest = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise InputError([*problems[:SHOWN_PROBLEMS], *rest])


@contextmanager
def _adapter(model: FusedModel, is_on: bool) -> Iterator[None]:
    """Inside, the model computes with or without its adapter; parameters learn afterwards as before."""
    if is_on or model.adapted is None:
        yield
        return
    # PEFT makes an adapter learn when it switches it on again.
    learnt = [(parameter, parameter.requires_grad) for parameter in model.graph.parameters()]
    try:
        with model.adapted.disable_adapter():
            yield
    finally:
        for parameter, learns in learnt:
            parameter.requires_grad_(learns)


def _losses(model: FusedModel, samples: Sequence[EncodedSample], pad: int, batch_size: int) -> Rows:
    """Each sample's summed loss in nats, and its trained tokens: [n, 2]."""
    found = np.zeros((len(samples), 2))
    order = sorted((n for n, sample in enumerate(samples) if sample.trained_tokens), key=lambda n: -len(samples[n]))
    if not order:
        raise InputError("no token of the samples is trained, so there is no loss")
    while order:
        longest = len(samples[order[0]])
        count = max(1, min(batch_size, LOSS_BATCH_TOKENS // longest))
        chosen, order = order[:count], order[count:]
        batch = collate([[samples[n]] for n in chosen], longest, pad)
        logprobs, weights = model.logprobs(batch)
        rows = batch.weights.reshape(-1).nonzero().squeeze(1) // batch.weights.shape[1]
        sums = torch.zeros(len(chosen), 2, dtype=torch.float64)
        sums.index_add_(0, rows, torch.stack([-logprobs.double() * weights.double(), weights.double()], 1))
        found[chosen] = sums.numpy()
    if not np.isfinite(found).all():
        raise FituneError("the model's log-probabilities are not finite (NaN or infinite)")
    return found[found[:, 1] > 0]


def _mean_loss(sums: Rows) -> float:
    return float(sums[0] / sums[1])
