"""A run's result against its base: the samples it is judged on, and both models' results on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from fitune.config.schema import RunConfig
from fitune.data.conversation import Sample
from fitune.data.dataset import load_training_data, original_samples, read_validation_file
from fitune.data.encoded_file import Watch
from fitune.data.reading import read_samples
from fitune.errors import InputError
from fitune.evaluate.task_evaluation import TaskEvaluation, check_samples, evaluate_task
from fitune.fuse.model import FusedModel
from fitune.generate.generation import Progress
from fitune.generate.stopping import stop_ids
from fitune.hardware import detect
from fitune.models.find import find_model
from fitune.models.source import ModelSource
from fitune.plan.computation import choose_computation
from fitune.train.prepare import build_for_answers

# (what is done, how many samples) -> a context in which progress is shown.
Bar = Callable[[str, int], AbstractContextManager[Progress]]


def evaluation_samples(config: RunConfig, source: ModelSource, watch: Watch | None = None) -> list[Sample]:
    """What a run is judged on: `evaluate.data`, else the validation data, held out exactly as the run did.

    `watch` hears how far it is, where all data are read for it.

    Of preferences only the better answers: a pair is the conversation with the one that was chosen, and an answer
    that was judged bad is left out.

    Raises InputError where neither is set, the data cannot be read any more, or no good answer is in them.
    """
    samples = _samples(config, source, watch)
    good = [replace(sample, rejected=(), label=None) for sample in samples if sample.label is not False]
    if samples and not good:
        raise InputError("all of their answers are labelled bad: there is nothing to judge by", where="evaluate.data")
    return good


def _samples(config: RunConfig, source: ModelSource, watch: Watch | None) -> list[Sample]:
    if config.evaluate.data is not None:
        return read_samples(config.evaluate.data)
    if isinstance(config.data.validation, str):
        return read_validation_file(config.data)
    if config.data.validation is None:
        raise InputError("this run held out no data; give a file with --data", where="data.validation")
    data = load_training_data(config.data, source.tokenizer(), config.seed, watch, config.train.objective)
    return list(original_samples(data, data.validation))


def check_evaluation(config: RunConfig, source: ModelSource, watch: Watch | None = None) -> list[Sample]:
    """The samples, after everything that can be wrong with them was looked for: before anything is trained."""
    samples = evaluation_samples(config, source, watch)
    database = None if config.evaluate.database is None else Path(config.evaluate.database)
    check_samples(samples, config.evaluate.task, database)
    return samples


def compare_with_base(
    model: FusedModel, source: ModelSource, config: RunConfig, samples: Sequence[Sample], bar: Bar
) -> tuple[TaskEvaluation, TaskEvaluation]:
    """Base and tuned model on the task of `config.evaluate`, in this order.

    `model` is the tuned one. With an adapter the base is that model with the adapter off; without one (method
    full) it is built beside it.
    """
    base_model = model
    if model.adapted is None:
        computation = choose_computation(config, detect(), for_training=False)
        base_model = build_for_answers(find_model(config.model), "lora", computation)
    base = evaluate_one(base_model, source, config, samples, bar, "base", with_adapter=False)
    return base, evaluate_one(model, source, config, samples, bar, "tuned")


def evaluate_one(
    model: FusedModel, source: ModelSource, config: RunConfig, samples: Sequence[Sample], bar: Bar, what: str,
    with_adapter: bool = True,
) -> TaskEvaluation:  # fmt: skip
    """One model on the task of `config.evaluate`."""
    settings = config.evaluate
    assert settings.task != "none"
    tokenizer = source.tokenizer()
    with bar(what, len(samples)) as progress:
        return evaluate_task(
            model,
            tokenizer,
            samples,
            settings.task,
            eos_ids=stop_ids(source, tokenizer),
            database=None if settings.database is None else Path(settings.database),
            system=config.data.system,
            train_on=config.data.train_on,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch,
            with_adapter=with_adapter,
            on_progress=progress,
        )
