"""`fitune train`: a run file in, a run folder with the tuned model out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fitune.errors import InputError

if TYPE_CHECKING:
    from fitune.evaluate.task_evaluation import TaskEvaluation
    from fitune.step.ranks import Ranks
    from fitune.train.run import Outcome


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file, or the folder of a run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE", help="Settings instead of the file's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train although the plan does not fit, or go on although the run changed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Train a model: show the data and the plan, train, and say what came out."""
    from fitune.step.ranks import joined

    with joined() as ranks, nullcontext() if ranks.is_first else _silence():
        _train(run, overrides or [], resume, force, as_json, ranks)


@contextmanager
def _silence() -> Iterator[None]:
    """Of several processes the first one tells what they do; errors are told by each."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _train(run: Path, overrides: list[str], resume: bool, force: bool, as_json: bool, ranks: Ranks) -> None:
    from fitune import config as run_file
    from fitune.cli.output import print_json, print_warnings

    path = run / "config.yaml" if (run / "config.yaml").is_file() else run
    config = run_file.load(path, overrides)
    if resume and config.output is None:
        raise InputError(
            "--resume needs to know which run: give output=FOLDER, or the run file in that folder "
            "(fitune train FOLDER/config.yaml --resume)",
            where=path,
        )
    from fitune.cli.encoding_view import encoding
    from fitune.cli.plan_page import fits_sentence, print_plan
    from fitune.config.cautions import cautions
    from fitune.train.comparing import check_evaluation, compare_with_base
    from fitune.train.data_cautions import data_cautions
    from fitune.train.progress_view import TrainingView
    from fitune.train.resuming import is_unfinished
    from fitune.train.run import default_folder, plan_run, prepare_run, resumed, train_run
    from fitune.train.run_folder import RunFolder

    if config.output is not None and is_unfinished(RunFolder(Path(config.output))):
        resume = True  # the same command again goes on
    if resume and config.output is not None:
        config = resumed(config, RunFolder(Path(config.output)))
    with encoding() as watch:
        prepared = prepare_run(config, choose=not resume, watch=watch, ranks=ranks)
    config = prepared.config
    folder = RunFolder(Path(config.output or ranks.told(str(default_folder(config)))))
    warnings = [*prepared.source.warnings(), *cautions(config), *data_cautions(config, prepared.data.train)]
    print_warnings(warnings)
    judged = config.evaluate.task != "none"
    samples = check_evaluation(config, prepared.source) if judged else []
    if not as_json:
        _print_data(prepared.data.report)
    plan = plan_run(prepared)
    if not as_json:
        print_plan(plan)
        print(flush=True)
    with TrainingView(prepared.workload.steps, plan.peak_bytes) as view:
        if not plan.fits:
            if not force:
                raise InputError(f"{fits_sentence(plan)}; --force trains all the same", where=path)
            view.say(f"warning: {fits_sentence(plan)}; training all the same, as --force says")
        outcome = train_run(prepared, plan, folder, resume, view, view.quantising, view.say, force=force, ranks=ranks)
    if not ranks.is_first:
        return
    facts = _facts(outcome) | {"warnings": warnings}
    scores: tuple[TaskEvaluation | None, TaskEvaluation] | None = None
    if judged:
        from fitune.cli.score_page import answering, scores_json

        scores = compare_with_base(outcome.model, prepared.source, config, samples, answering)
        facts["evaluation"] = scores_json(*scores)
        folder.write_json(folder.evaluation_file, facts["evaluation"])
    _write_report(folder, scores)
    if as_json:
        print_json(facts)
    else:
        _print_outcome(outcome, scores)


def _facts(outcome: Outcome) -> dict[str, Any]:
    return {
        "run": outcome.folder.path,
        "steps": outcome.losses[-1][0] if outcome.losses else 0,
        "first_loss": outcome.losses[0][1] if outcome.losses else None,
        "final_loss": outcome.losses[-1][1] if outcome.losses else None,
        "validation_loss": outcome.validation[-1][1] if outcome.validation else None,
        "score": vars(outcome.scores[-1]) if outcome.scores else None,
        "seconds": outcome.seconds,
        "peak_bytes": outcome.peak_bytes,
        "planned_peak_bytes": outcome.plan.peak_bytes,
        "sha256": outcome.digest,
        "evaluation": None,
    }


def _print_data(report: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(report.as_rich())
    console.print()


def _write_report(folder: Any, scores: tuple[TaskEvaluation | None, TaskEvaluation] | None) -> None:
    from fitune.evaluate.html_report import write_report
    from fitune.train.reporting import report_of_run

    write_report(folder.report_file, report_of_run(folder, *(scores or (None, None))))


def _print_outcome(outcome: Outcome, scores: tuple[TaskEvaluation | None, TaskEvaluation] | None) -> None:
    from fitune.cli.output import gigabytes, print_facts
    from fitune.cli.score_page import print_scores
    from fitune.train.progress_view import clock
    from fitune.train.scoring import score_in_words

    lines = {"run": str(outcome.folder.path)}
    if outcome.losses:
        first, last = outcome.losses[0], outcome.losses[-1]
        lines["loss"] = f"{first[1]:.4f} at step {first[0]}, {last[1]:.4f} at step {last[0]}"
    if outcome.validation:
        lines["validation loss"] = f"{outcome.validation[-1][1]:.4f}"
    if outcome.scores:
        lines["score"] = score_in_words(vars(outcome.scores[-1]))
    planned = "" if outcome.plan.seconds is None else f" (planned {clock(outcome.plan.seconds)})"
    lines["time"] = f"{clock(outcome.seconds)}{planned}"
    lines["peak memory"] = f"{gigabytes(outcome.peak_bytes)} (planned {gigabytes(outcome.plan.peak_bytes)})"
    lines["report"] = str(outcome.folder.report_file)
    print_facts("Trained", lines)
    if scores is not None:
        print_scores(*scores)
    path = outcome.folder.path
    print(f"\nNext:\n  fitune chat {path}\n  fitune evaluate {path}")
    if outcome.model.adapted is not None:
        print(f"  fitune merge {path}")
