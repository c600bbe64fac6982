"""What there is to know of training data as one HTML page that needs nothing else."""

from __future__ import annotations

from html import escape

from fitune.data.report import DataReport, SampleView, facts_of
from fitune.evaluate.report_style import STYLE

SHOWN_PROBLEMS = 200
_OWN_STYLE = """
.sample { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 0.85rem; }
.sample mark { background: #b8ecc4; color: #08290f; }
.bar { display: inline-block; height: 0.7rem; background: currentColor; opacity: 0.5; }
.refused { color: #b00020; }
"""


def data_report_page(report: DataReport, model: str, seconds: float | None) -> str:
    """The report as the text of an HTML page; every string in it is escaped."""
    facts = [("model", model), *facts_of(report)]
    if seconds is not None:
        facts.append(("an epoch takes about", f"{seconds:,.0f} s on this machine"))
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    refused = "".join(f"<li>{escape(sentence)}</li>" for sentence in report.refused)
    parts = [
        "<header><h1>Training data</h1></header>",
        f'<section class="refused"><h2>Cannot be trained on</h2><ul>{refused}</ul></section>' if refused else "",
        f"<section><h2>Facts</h2><dl>{lines}</dl></section>",
        f"<section><h2>Lengths in tokens</h2>{_lengths(report)}</section>",
        f"<section><h2>What is trained</h2>{''.join(map(_sample, report.views))}</section>",
        _problems(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Training data</title>\n<style>\n{STYLE}{_OWN_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n<footer>Written by fitune.</footer>\n</body>\n</html>\n"
    )


def _lengths(report: DataReport) -> str:
    most = max((count for _, count in report.lengths), default=1)
    rows = "".join(
        f'<tr><td>up to {upper:,}</td><td>{count:,}</td><td><span class="bar" style="width: '
        f'{20 * count / most:.1f}rem"></span></td></tr>'
        for upper, count in report.lengths
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _sample(view: SampleView) -> str:
    pieces = ""
    was_worse = False
    for piece in view.pieces:
        pieces += "\n<strong>the worse answer</strong> " if piece.is_worse and not was_worse else ""
        pieces += f"<mark>{escape(piece.text)}</mark>" if piece.is_trained else escape(piece.text)
        was_worse = piece.is_worse
    return f'<h3>{escape(view.origin)}</h3><p class="sample">{pieces}</p>'


def _problems(report: DataReport) -> str:
    if not report.problems:
        return ""
    shown = "".join(f"<li>{escape(str(item))}</li>" for item in report.problems[:SHOWN_PROBLEMS])
    count = len(report.problems) + report.more_problems
    more = count - SHOWN_PROBLEMS
    rest = f"<p>and {more:,} more</p>" if more > 0 else ""
    return f"<section><h2>{count:,} things to know</h2><ul>{shown}</ul>{rest}</section>"
