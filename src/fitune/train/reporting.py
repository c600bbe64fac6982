"""A run folder in, the contents of its report out."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from fitune.evaluate.run_report import Example, Fact, PlannedRow, RunReport, ScoreRow
from fitune.evaluate.task_evaluation import SCORES, TaskEvaluation, compare_evaluations
from fitune.train.run_folder import RunFolder
from fitune.train.scoring import score_in_words

SHOWN_EXAMPLES = 10


def report_of_run(folder: RunFolder, base: TaskEvaluation | None, tuned: TaskEvaluation | None) -> RunReport:
    """What a finished run wrote, and its evaluation if there is one, as a report."""
    summary = json.loads(folder.summary_file.read_text(encoding="utf-8"))
    plan = json.loads(folder.plan_file.read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in folder.metrics_file.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in metrics if "loss" in line]
    data, machine = summary["data"], summary["machine"]
    trained = [
        Fact("model", summary["model"]),
        Fact("method", summary["method"]),
        *(Fact("computation", item["value"]) for item in plan["settings"] if item["name"] == "computation"),
        Fact("steps", f"{summary['steps']:,}"),
        Fact("tokens", f"{sum(line['tokens'] for line in steps):,}"),
        Fact("trained tokens", f"{sum(line['trained_tokens'] for line in steps):,}"),
        Fact("samples", f"{data['train_samples']:,} to train, {data['validation_samples']:,} held out"),
        Fact("digest (SHA-256)", summary["sha256"]),
    ]
    if summary.get("score"):
        trained.append(Fact("score at the end", score_in_words(summary["score"])))
    path = folder.path
    commands = [("Ask it", f"fitune chat {path}"), ("Judge it", f"fitune evaluate {path}")]
    if summary["method"] != "full":
        commands.append(("Merge it into its base", f"fitune merge {path}"))
    return RunReport(
        title=f"{summary['model']}, {summary['method']}",
        subtitle=str(path),
        finished=f"{datetime.fromtimestamp(folder.summary_file.stat().st_mtime):%Y-%m-%d %H:%M}",
        summary=_sentence(base, tuned),
        warnings=[summary["note"]] if summary["note"] else [],
        trained=trained,
        scores=score_rows(base, tuned),
        examples=examples(base, tuned),
        train_loss=[(line["step"], line["loss"]) for line in steps],
        validation_loss=[(line["step"], line["validation_loss"]) for line in metrics if "validation_loss" in line],
        learning_rate=[(line["step"], line["learning_rate"]) for line in steps],
        planned=_planned(plan, summary),
        environment=[
            Fact("processor", f"{machine['processor']}, {machine['threads']} threads"),
            Fact("system", f"{machine['system']}, Python {machine['python']}"),
            Fact("packages", ", ".join(f"{name} {version}" for name, version in machine["packages"].items())),
        ],
        config_yaml=folder.config_file.read_text(encoding="utf-8"),
        commands=commands,
    )


def score_rows(base: TaskEvaluation | None, tuned: TaskEvaluation | None) -> list[ScoreRow]:
    """Every score of an evaluation, with the paired difference where there are two."""
    if tuned is None:
        return []
    differences = compare_evaluations(base, tuned) if base is not None else {}
    return [
        ScoreRow(
            SCORES[name][0], base.scores[name] if base else None, interval, differences.get(name), *SCORES[name][1:]
        )
        for name, interval in tuned.scores.items()
    ]


def examples(base: TaskEvaluation | None, tuned: TaskEvaluation | None) -> list[Example]:
    """The first answers."""
    shown = []
    for number, answer in enumerate(tuned.answers[:SHOWN_EXAMPLES] if tuned else ()):
        before = base.answers[number] if base else None
        shown.append(
            Example(
                answer.question,
                answer.reference,
                before.text if before else None,
                answer.text,
                before.outcome.is_correct if before and before.outcome else None,
                answer.outcome.is_correct if answer.outcome else None,
                note=answer.outcome.message if answer.outcome else "",
            )
        )
    return shown


def _sentence(base: TaskEvaluation | None, tuned: TaskEvaluation | None) -> str:
    if tuned is None or base is None:
        return ""
    name = next(iter(tuned.scores))
    title, scale, _ = SCORES[name]
    one, two = base.scores[name], tuned.scores[name]
    if scale == "share":
        return f"{title}: {one.as_percent()} before, {two.as_percent()} after, on {tuned.samples:,} samples."
    return f"{title}: {one} before, {two} after, on {tuned.samples:,} samples."


def _planned(plan: dict[str, Any], summary: dict[str, Any]) -> list[PlannedRow]:
    rows = [
        PlannedRow("peak memory", f"{plan['peak_bytes'] / 1e9:.2f} GB", f"{summary['peak_bytes'] / 1e9:.2f} GB"),
        PlannedRow(
            "time", "unknown" if plan["seconds"] is None else f"{plan['seconds']:.0f} s",
            f"{summary['seconds']:.0f} s", "probe",
        ),
    ]  # fmt: skip
    rows += [PlannedRow(item["name"], f"{item['value'] / 1e9:.3f} GB", "", item["origin"]) for item in plan["memory"]]
    return rows
