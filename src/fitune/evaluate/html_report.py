"""A run's report as one HTML file that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from fitune.evaluate.intervals import Interval, PairedDifference
from fitune.evaluate.line_chart import Line, line_chart, moving_average
from fitune.evaluate.report_style import STYLE
from fitune.evaluate.run_report import Example, Fact, FormRow, PlannedRow, RunReport, ScoreRow

MOVING_AVERAGE_SHARE = 30  # the average runs over a thirtieth of the steps


def write_report(path: Path, report: RunReport) -> None:
    """Writes the report as a self-contained HTML file, atomically; an existing file is replaced."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(render_report(report))
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o644)  # mkstemp's files are private; a report is for showing
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def render_report(report: RunReport) -> str:
    """The report as the text of an HTML page; every string in it is escaped."""
    subtitle = " · ".join(part for part in (report.subtitle, report.finished) if part)
    parts = [
        f"<header><h1>{escape(report.title)}</h1>",
        f'<p class="sub">{escape(subtitle)}</p>' if subtitle else "",
        f'<p class="summary">{escape(report.summary)}</p>' if report.summary else "",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings),
        "</header>",
        _section("Before and after", _scores(report.scores)),
        _section("Examples", "".join(_example(example) for example in report.examples)),
        _section("What was trained", _facts(report.trained)),
        _section("Training", _curves(report)),
        _section("Plan and measurement", _planned(report.planned)),
        _section("Accuracy by form of question", _forms(report.forms)),
        _section("Environment", _facts(report.environment)),
        _section("Next", _commands(report.commands)),
        _section("Configuration", _config(report.config_yaml)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n<footer>Written by fitune.</footer>\n</body>\n</html>\n"
    )


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def _facts(facts: Sequence[Fact]) -> str:
    if not facts:
        return ""
    lines = "".join(f"<dt>{escape(fact.name)}</dt><dd>{escape(fact.value)}</dd>" for fact in facts)
    return f"<dl>{lines}</dl>"


def _table(heads: Iterable[tuple[str, str]], rows: Iterable[str]) -> str:
    """Heads as (class, text), rows as finished HTML."""
    cells = "".join(f'<th scope="col" class="{kind}">{escape(text)}</th>' for kind, text in heads)
    head = f"<thead><tr>{cells}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _scores(scores: Sequence[ScoreRow]) -> str:
    if not scores:
        return ""
    drawn = any(row.scale == "share" for row in scores)
    heads = [("", "Score"), ("n", "Base"), ("n", "Tuned"), ("n", "Change")]
    rows = []
    for row in scores:
        cells = [
            f'<th scope="row">{escape(row.name)}{_counts(row)}</th>',
            _interval(row.base, row.scale),
            _interval(row.tuned, row.scale),
            _change(row),
        ]
        if drawn:
            cells.append(f'<td class="range">{_range(row) if row.scale == "share" else ""}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    if drawn:
        heads.append(("", "0 to 100 %"))
    methods = sorted({part.method for row in scores for part in (row.base, row.tuned) if part is not None})
    tests = sorted({row.difference.p_method for row in scores if row.difference is not None})
    level = next((part.level for row in scores for part in (row.tuned, row.base) if part is not None), 0.95)
    note = f"In brackets: {100 * level:.0f} % intervals ({'; '.join(methods)})." if methods else ""
    if tests:
        note += f" p-values: {'; '.join(tests)}."
    key = '<span><i class="second"></i>base</span><span><i></i>tuned</span>' if drawn else ""
    return _table(heads, rows) + f'<p class="key">{key}{escape(note)}</p>'


def _counts(row: ScoreRow) -> str:
    counts = sorted({part.count for part in (row.base, row.tuned) if part is not None})
    return f'<br><small class="muted">{escape(" and ".join(f"{count:,}" for count in counts))} items</small>'


def _number(value: float, scale: str) -> str:
    return f"{100 * value:.1f} %" if scale == "share" else f"{value:.2f}"


def _bounds(low: float, high: float, scale: str) -> str:
    text = f"({100 * low:.1f} to {100 * high:.1f})" if scale == "share" else f"({low:.2f} to {high:.2f})"
    return text.replace("-", "−")


def _interval(interval: Interval | None, scale: str) -> str:
    if interval is None:
        return '<td class="n muted">not measured</td>'
    bounds = _bounds(interval.low, interval.high, scale)
    return f'<td class="n">{_number(interval.value, scale)}<small>{bounds}</small></td>'


def _change(row: ScoreRow) -> str:
    difference: PairedDifference | None = row.difference
    if difference is not None:
        value = difference.difference
        p_text = "p < 0.0001" if difference.p_value < 1e-4 else f"p = {difference.p_value:.4f}"
        detail = f"<small>{_bounds(difference.low, difference.high, row.scale)}</small><small>{p_text}</small>"
    elif row.base is not None and row.tuned is not None:
        value, detail = row.tuned.value - row.base.value, ""
    else:
        return '<td class="n muted">–</td>'
    gained = value > 0 if row.better == "higher" else value < 0
    kind = "muted" if value == 0 else "good" if gained else "bad"
    text = f"{100 * value:+.1f} points" if row.scale == "share" else f"{value:+.2f}"
    text = text.replace("-", "−")
    return f'<td class="n"><span class="{kind}">{text}</span>{detail}</td>'


def _range(row: ScoreRow) -> str:
    """Both intervals on one scale from 0 to 1: a whisker for the interval, a mark for the value."""
    lines = ['<path class="track" d="M0 13H100M0 29H100"/>']
    for kind, y, interval in (("base", 13, row.base), ("tuned", 29, row.tuned)):
        if interval is not None:
            low, value, high = 100 * interval.low, 100 * interval.value, 100 * interval.high
            lines.append(f'<path class="whisker {kind}" d="M{low:.2f} {y}H{high:.2f}"/>')
            lines.append(f'<path class="mark {kind}" d="M{value:.2f} {y - 6}V{y + 6}"/>')
    return f'<svg viewBox="0 0 100 42" preserveAspectRatio="none" aria-hidden="true">{"".join(lines)}</svg>'


def _verdict(right: bool | None) -> str:
    if right is None:
        return ""
    return '<b class="good">✓ right</b>' if right else '<b class="bad">✗ wrong</b>'


def _example(example: Example) -> str:
    rows = []
    for name, answer, right in (
        ("Base", example.base, example.base_right),
        ("Tuned", example.tuned, example.tuned_right),
        ("Reference", example.reference, None),
    ):
        if answer is None:
            continue
        shown = f"<code>{escape(answer)}</code>" if answer.strip() else '<span class="muted">(nothing)</span>'
        rows.append(f'<div class="row"><span>{name} {_verdict(right)}</span>{shown}</div>')
    group = f' <small class="muted">{escape(example.group)}</small>' if example.group else ""
    note = f'<p class="muted">{escape(example.note)}</p>' if example.note else ""
    return f'<article class="example"><h3>{escape(example.question)}{group}</h3>{"".join(rows)}{note}</article>'


def _forms(forms: Sequence[FormRow]) -> str:
    if not forms:
        return ""
    rows = []
    for group, members in groupby(forms, key=lambda row: row.group):
        if group:
            rows.append(f'<tr class="group"><th colspan="4" scope="rowgroup">{escape(group)}</th></tr>')
        for row in members:
            base, tuned = _share(row.base_right, row.count), _share(row.tuned_right, row.count)
            rows.append(
                f'<tr class="tight"><th scope="row">{escape(row.form)}</th>'
                f'<td class="n">{row.count:,}</td>{base}{tuned}</tr>'
            )
    return _table([("", "Form"), ("n", "Questions"), ("n", "Base right"), ("n", "Tuned right")], rows)


def _share(right: int | None, count: int) -> str:
    if right is None or count == 0:
        return '<td class="n muted">–</td>'
    return f'<td class="n">{right:,} ({100 * right / count:.0f} %)</td>'


def _curves(report: RunReport) -> str:
    window = max(1, len(report.train_loss) // MOVING_AVERAGE_SHARE)
    lines = []
    if window > 1:
        averaged = moving_average(report.train_loss, window)
        lines = [Line("each step", report.train_loss, "faint"), Line(f"mean of {window} steps", averaged)]
    elif report.train_loss:
        lines = [Line("training", report.train_loss)]
    if report.validation_loss:
        lines.append(Line("validation", report.validation_loss, "second"))
    charts = [
        line_chart(lines, x_name="step", y_name="Loss (nats a trained token)"),
        line_chart([Line("", report.learning_rate)], x_name="step", y_name="Learning rate", small=True),
    ]
    drawn = "".join(chart for chart in charts if chart)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _planned(planned: Sequence[PlannedRow]) -> str:
    if not planned:
        return ""
    heads = [("", "Number"), ("n", "Planned"), ("n", "Measured")]
    with_origin = any(row.origin for row in planned)
    if with_origin:
        heads.append(("", "Where the plan took it from"))
    rows = []
    for row in planned:
        origin = f'<td class="muted">{escape(row.origin)}</td>' if with_origin else ""
        rows.append(
            f'<tr><th scope="row">{escape(row.name)}</th><td class="n">{escape(row.planned)}</td>'
            f'<td class="n">{escape(row.measured)}</td>{origin}</tr>'
        )
    return _table(heads, rows)


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<p>{escape(what)}</p><pre>{escape(command)}</pre>" for what, command in commands)


def _config(config_yaml: str) -> str:
    if not config_yaml.strip():
        return ""
    shown = f"<pre>{escape(config_yaml)}</pre>"
    return f"<details open><summary>The run file that reproduces this run</summary>{shown}</details>"
