"""Scores for people and for programs: base beside tuned, each with its interval."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fitune.cli.output import print_facts, print_table

if TYPE_CHECKING:
    from fitune.evaluate.intervals import Interval
    from fitune.evaluate.task_evaluation import TaskEvaluation
    from fitune.generate.generation import Progress

SHOWN_ANSWERS = 3


def print_scores(base: TaskEvaluation | None, tuned: TaskEvaluation) -> None:
    """The table of scores, then some answers."""
    from fitune.evaluate.task_evaluation import SCORES, compare_evaluations

    differences = compare_evaluations(base, tuned) if base is not None else {}
    rows = []
    for name, interval in tuned.scores.items():
        title, scale, _ = SCORES[name]
        row = [title]
        if base is not None:
            change = differences[name]
            p_text = "p < 0.0001" if change.p_value < 1e-4 else f"p = {change.p_value:.4f}"
            points = f"{100 * change.difference:+.1f} points" if scale == "share" else f"{change.difference:+.2f}"
            row += [_shown(base.scores[name], scale), _shown(interval, scale), f"{points}, {p_text}"]
        else:
            row.append(_shown(interval, scale))
        rows.append(row)
    print(f"\n{tuned.samples:,} samples; in brackets 95 % intervals")
    print_table(("score", "base", "tuned", "change") if base is not None else ("score", "value"), rows)
    if tuned.unfinished:
        print(f"{tuned.unfinished} answers reached the most new tokens allowed and were stopped there")
    _print_answers(base, tuned)


def _shown(interval: Interval, scale: str) -> str:
    return interval.as_percent() if scale == "share" else str(interval)


def _print_answers(base: TaskEvaluation | None, tuned: TaskEvaluation) -> None:
    for number, answer in enumerate(tuned.answers[:SHOWN_ANSWERS]):
        facts = {"reference": _line(answer.reference)}
        for name, evaluation in (("base", base), ("tuned" if base else "answer", tuned)):
            if evaluation is not None:
                given = evaluation.answers[number]
                verdict = f"  [{given.outcome.outcome}]" if given.outcome is not None else ""
                facts[name] = _line(given.text) + verdict
        print_facts(f"\n{_line(answer.question)}", facts)


def _line(text: str) -> str:
    flat = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return flat if len(flat) <= 160 else f"{flat[:157]}..."


def scores_json(base: TaskEvaluation | None, tuned: TaskEvaluation) -> dict[str, Any]:
    """The same numbers as JSON-able values."""
    from fitune.evaluate.task_evaluation import compare_evaluations

    differences = compare_evaluations(base, tuned) if base is not None else {}
    return {
        "task": tuned.task,
        "samples": tuned.samples,
        "base": None if base is None else _numbers(base),
        "tuned": _numbers(tuned),
        "difference": {
            name: {"value": change.difference, "low": change.low, "high": change.high, "p_value": change.p_value}
            for name, change in differences.items()
        },
        "signatures": tuned.signatures,
        "new_tokens": tuned.new_tokens + (base.new_tokens if base else 0),
        "unfinished": tuned.unfinished,
        "seconds": tuned.seconds + (base.seconds if base else 0.0),
    }


def _numbers(evaluation: TaskEvaluation) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        name: {"value": interval.value, "low": interval.low, "high": interval.high}
        for name, interval in evaluation.scores.items()
    }
    if evaluation.task == "sql":
        outcomes = [answer.outcome.outcome for answer in evaluation.answers if answer.outcome is not None]
        numbers["outcomes"] = {name: outcomes.count(name) for name in sorted(set(outcomes))}
    return numbers


@contextmanager
def answering(what: str, total: int) -> Iterator[Progress]:
    """A bar on stderr for as long as answers are generated; on no terminal one line."""
    import sys

    if not sys.stderr.isatty():
        print(f"{what}: {total} samples", file=sys.stderr, flush=True)
        yield lambda stats: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(what, total=total)
        yield lambda stats: bar.update(row, completed=stats.prompts_done)
