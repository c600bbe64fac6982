"""What a quickstart found out: as lines on the screen, as JSON, as the run's HTML report."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from fitune.demo.lesson import SCORE, SETS, Quickstart
from fitune.evaluate.html_report import write_report
from fitune.evaluate.intervals import Interval
from fitune.evaluate.run_report import Example, FormRow, RunReport, ScoreRow
from fitune.evaluate.task_evaluation import correct_of
from fitune.train.reporting import report_of_run

EXAMPLES = 5
TITLES = {"values": "unseen values", "phrasings": "unseen phrasings"}


def as_json(found: Quickstart) -> dict[str, Any]:
    """The numbers; the keys are a promise to programs."""
    return {
        "execution_accuracy": found.accuracy,
        "intervals": {
            f"{when}_{name}": [evaluations[name].scores[SCORE].low, evaluations[name].scores[SCORE].high]
            for when, evaluations in (("base", found.base), ("tuned", found.tuned))
            for name in SETS
        },
        "questions": {name: found.tuned[name].samples for name in SETS},
        "seconds": round(found.seconds, 1),
        "peak_bytes": found.peak_bytes,
        "planned_peak_bytes": found.outcome.plan.peak_bytes,
        "run": str(found.outcome.folder.path),
    }


def score_lines(found: Quickstart) -> list[tuple[str, Interval, Interval]]:
    """(held-out set, base, tuned) execution accuracy with 95 % intervals."""
    return [(TITLES[name], found.base[name].scores[SCORE], found.tuned[name].scores[SCORE]) for name in SETS]


def example_answers(found: Quickstart) -> list[Example]:
    """Questions with the SQL before and after, taken evenly from both sets so that many forms show."""
    chosen = []
    for number in range(EXAMPLES):
        name = SETS[number % len(SETS)]
        base, tuned = found.base[name].answers, found.tuned[name].answers
        place = number * len(base) // EXAMPLES
        before, after = base[place], tuned[place]
        chosen.append(
            Example(
                after.question,
                after.reference,
                before.text,
                after.text,
                bool(before.outcome and before.outcome.is_correct),
                bool(after.outcome and after.outcome.is_correct),
                group=TITLES[name],
                note=after.outcome.message if after.outcome else "",
            )
        )
    return chosen


def form_rows(found: Quickstart) -> list[FormRow]:
    """How many questions of each form were right, after and (where the base was asked all of them) before."""
    held_out = {"values": found.questions.unseen_values, "phrasings": found.questions.unseen_phrasings}
    rows = []
    for name in SETS:
        forms = [question.form for question in held_out[name]]
        right = {
            when: Counter(
                form for form, is_right in zip(forms, correct_of(evaluations[name]), strict=False) if is_right
            )
            for when, evaluations in (("base", found.base), ("tuned", found.tuned))
        }
        asked_base = found.base[name].samples == len(forms)
        for form, count in sorted(Counter(forms).items()):
            rows.append(
                FormRow(form, count, right["base"][form] if asked_base else None, right["tuned"][form], TITLES[name])
            )
    return rows


def write_html(found: Quickstart) -> None:
    """Writes the run's report.html."""
    folder = found.outcome.folder
    report: RunReport = report_of_run(folder, None, None)
    accuracy = found.accuracy
    summary = (
        f"Execution accuracy on {found.tuned['values'].samples} questions with unseen values: "
        f"{100 * accuracy['tuned_values']:.1f} %, on {found.tuned['phrasings'].samples} with unseen phrasings: "
        f"{100 * accuracy['tuned_phrasings']:.1f} %; before training {100 * accuracy['base']:.1f} %."
    )
    write_report(
        folder.report_file,
        replace(
            report,
            title="Text-to-SQL in a few minutes",
            summary=summary,
            scores=[ScoreRow(f"Execution accuracy, {name}", base, tuned) for name, base, tuned in score_lines(found)],
            forms=form_rows(found),
            examples=example_answers(found),
            warnings=[*report.warnings, str(found.disjoint)],
            commands=next_commands(found),
        ),
    )


def next_commands(found: Quickstart) -> list[tuple[str, str]]:
    """What to do next, as (what it does, command)."""
    run = found.outcome.folder.path
    return [
        (
            "Ask it a question",
            f'fitune chat {run} --database {found.database} --prompt "How many customers are there?"',
        ),
        ("Train on your own file", "fitune init my-task.yaml && fitune train my-task.yaml"),
        ("Merge it into its 16-bit base, for other programs", f"fitune merge {run}"),
    ]
