"""`fitune evaluate`: how good a model is at a task, and how much better than its base."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fitune.errors import InputError

if TYPE_CHECKING:
    from fitune.config.schema import RunConfig
    from fitune.evaluate.task_evaluation import TaskEvaluation
    from fitune.train.trained_model import TrainedModel


class Task(StrEnum):
    sql = "sql"
    text = "text"
    perplexity = "perplexity"


def command(
    model: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="A run's folder, an adapter's folder, or a model.")
    ],
    data: Annotated[Path | None, typer.Option(help="The questions and answers; without it those of the run.")] = None,
    task: Annotated[Task | None, typer.Option(help="What is measured; without it what the run file says.")] = None,
    database: Annotated[Path | None, typer.Option(help="The SQLite file for task sql.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    with_base: Annotated[bool, typer.Option("--base/--no-base", help="Measure the base model too.")] = True,
    four_bit: Annotated[
        bool | None,
        typer.Option("--four-bit/--sixteen-bit", help="How the base is loaded; a run: as it was trained."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report to this HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Measure a model on a task, next to its base model, with intervals."""
    problems = [f"--{name} {path}: no such file" for name, path in (("data", data),) if path and not path.is_file()]
    if html is not None and not html.absolute().parent.is_dir():
        problems.append(f"--html {html}: there is no folder {html.absolute().parent} to write it in")
    if problems:
        raise InputError(problems)
    from fitune.cli.encoding_view import encoding
    from fitune.cli.output import print_json, print_warnings
    from fitune.cli.score_page import answering, print_scores, scores_json
    from fitune.train.comparing import check_evaluation, compare_with_base, evaluate_one
    from fitune.train.trained_model import default_config, find_trained

    found = find_trained(model, four_bit)
    config = _settings(found.config or default_config(model), data, task, database, max_new_tokens)
    print_warnings(found.source.warnings())
    with encoding() as watch:
        samples = check_evaluation(config, found.source, watch)
    read = len(samples)
    samples = samples[:limit]
    built = found.build()
    base: TaskEvaluation | None = None
    if with_base and found.untuned is not None:
        config = config.model_copy(update={"model": found.untuned.reference})
        base, tuned = compare_with_base(built, found.source, config, samples, answering)
    else:
        tuned = evaluate_one(built, found.source, config, samples, answering, "answers")
    if html is not None:
        _write_html(html, found, base, tuned)
    if as_json:
        print_json({"model": model, "note": found.source.note, "samples_read": read, **scores_json(base, tuned)})
        return
    if found.source.note:
        print(found.source.note)
    if len(samples) < read:
        print(f"Only the first {len(samples):,} of {read:,} samples, as --limit says")
    print_scores(base, tuned)


def _settings(
    config: RunConfig, data: Path | None, task: Task | None, database: Path | None, max_new_tokens: int | None
) -> RunConfig:
    """The run's settings with the options in their place."""
    given = {
        "task": task.value if task else None,
        "data": str(data) if data else None,
        "database": str(database) if database else None,
        "max_new_tokens": max_new_tokens,
    }
    settings = config.evaluate.model_copy(update={name: value for name, value in given.items() if value is not None})
    if settings.task == "none":
        raise InputError("say what to measure: --task sql, text or perplexity")
    if settings.data is None and config.data.train[0].path == "none":
        raise InputError("give the questions and answers to measure it on: --data FILE")
    if settings.database is not None and settings.task != "sql":
        if database is not None:
            raise InputError(f"--database is for task sql, not {settings.task}; leave it out")
        settings = settings.model_copy(update={"database": None})
    return config.model_copy(update={"evaluate": settings})


def _write_html(path: Path, found: TrainedModel, base: TaskEvaluation | None, tuned: TaskEvaluation) -> None:
    from fitune.evaluate.html_report import write_report
    from fitune.evaluate.run_report import RunReport
    from fitune.train.reporting import examples, report_of_run, score_rows

    if found.run is not None and found.run.summary_file.is_file():
        write_report(path, report_of_run(found.run, base, tuned))
        return
    report = RunReport(
        title=found.reference,
        warnings=[found.source.note] if found.source.note else [],
        scores=score_rows(base, tuned),
        examples=examples(base, tuned),
    )
    write_report(path, report)
