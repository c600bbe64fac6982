"""The report is one whole page, alone, honest about gaps, and shows strings as strings."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fitune.evaluate.html_report import render_report, write_report
from fitune.evaluate.intervals import paired_difference, proportion_interval
from fitune.evaluate.line_chart import Line, line_chart, moving_average, tick_text, ticks
from fitune.evaluate.run_report import Example, Fact, FormRow, PlannedRow, RunReport, ScoreRow

HOSTILE = """</style></pre><script>alert("x")</script><img src='http://evil/a' onerror=alert(1)> & " '"""
VOID = {"meta", "br", "path", "img", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def full_report(word: str) -> RunReport:
    base, tuned = [False] * 50, [True] * 45 + [False] * 5
    shares = [proportion_interval(sum(outcomes), len(outcomes)) for outcomes in (base, tuned)]
    return RunReport(
        title=f"title {word}",
        subtitle=f"subtitle {word}",
        finished=f"finished {word}",
        summary=f"summary {word}",
        trained=[Fact(f"fact {word}", f"value {word}")],
        warnings=[f"warning {word}"],
        scores=[
            ScoreRow(f"accuracy {word}", *shares, paired_difference(base, tuned)),
            ScoreRow("perplexity", shares[1], None, scale="number", better="lower"),
        ],
        forms=[FormRow(f"form {word}", 10, 1, None, f"set {word}"), FormRow("empty form", 0, 0, 0)],
        examples=[
            Example(f"question {word}", f"gold {word}", "", f"tuned {word}", False, True, word, f"note {word}")
        ],
        train_loss=[(step, 3.0 / step) for step in range(1, 91)],
        validation_loss=[(30, 0.5), (90, 0.4)],
        learning_rate=[(1, 1e-4), (90, 0.0)],
        planned=[PlannedRow(f"memory {word}", f"1 GB {word}", f"2 GB {word}", f"dry run {word}")],
        environment=[Fact(f"machine {word}", f"cores {word}")],
        config_yaml=f"model: {word}\n",
        commands=[(f"ask {word}", f"fitune chat {word}")],
    )


def test_hostile_strings_are_text_and_nothing_more() -> None:
    tame, hostile = Page(render_report(full_report("tame"))), Page(render_report(full_report(HOSTILE)))
    assert hostile.tags == tame.tags
    assert not hostile.open
    assert "script" not in hostile.tags
    assert "img" not in hostile.tags
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count(HOSTILE) == tame.text.count("tame")
    assert tame.text.count("tame") >= 22, "every string of the report must reach the page"


def test_page_needs_nothing_else() -> None:
    text = render_report(full_report("plain"))
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not {"src", "href", "data", "srcset"} & {name for name, _ in page.attributes}
    for outside in ("http:", "https:", "url(", "@import", "//"):
        assert outside not in text


def test_numbers_and_gaps_are_shown() -> None:
    text = Page(render_report(full_report("x"))).text
    assert "90.0 %" in text
    assert "+90.0 points" in text
    assert "not measured" in text
    assert "McNemar exact" in text
    assert "(nothing)" in text
    assert "✗ wrong" in text
    assert "✓ right" in text
    assert "1 (10 %)" in text
    assert "mean of 3 steps" in text
    assert "validation" in text


def test_an_empty_report_is_a_page_without_sections() -> None:
    page = Page(render_report(RunReport(title="nothing yet")))
    assert "section" not in page.tags
    assert "nothing yet" in page.text


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RunReport) if field.name != "title"])
def test_every_part_can_be_left_out(field: str) -> None:
    empty = "" if isinstance(getattr(full_report("x"), field), str) else ()
    assert not Page(render_report(dataclasses.replace(full_report("x"), **{field: empty}))).open


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, full_report("größer 数据"))
    assert path.read_text(encoding="utf-8") == render_report(full_report("größer 数据"))
    broken = RunReport(title="x", trained=[None])  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        write_report(path, broken)
    assert "größer" in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_chart_draws_what_it_says() -> None:
    chart = line_chart([Line("loss", [(0, 2.0), (10, 1.0)])], x_name="step", y_name="nats")
    assert 'd="M0.0 0.0L1000.0 150.0"' in chart
    assert "nats by step: loss from 2 to 1" in chart
    assert line_chart([Line("empty", [])], x_name="x", y_name="y") == ""
    assert line_chart([Line("nan", [(1, float("nan"))])], x_name="x", y_name="y") == ""
    gaps = line_chart([Line("loss", [(1, 1.0), (2, float("nan")), (3, 2.0)])], x_name="x", y_name="y")
    assert "1 values are not finite" in gaps
    long = line_chart([Line("loss", [(step, 1.0) for step in range(2500)])], x_name="x", y_name="y")
    assert "mean of 3 values" in long
    assert long.count("L") < 1000
    single = line_chart([Line("loss", [(5, 1.0)])], x_name="x", y_name="y")
    assert "NaN" not in single
    assert "nan" not in single


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0, 2.7, 4) == [0, 1, 2, 3]
    assert ticks(0, 0.9, 4)[-1] == pytest.approx(1.0)
    assert ticks(0, 0, 4)[-1] > 0
    for low, high in ((0, 1e-3), (0.2, 0.3), (1, 330), (-5, 12), (0, 12345)):
        marks = ticks(low, high, 5)
        assert marks[0] <= low + 1e-12
        assert marks[-1] >= high - 1e-12
        assert 2 <= len(marks) <= 12
        assert len({tick_text(mark, marks) for mark in marks}) == len(marks)
    assert [tick_text(mark, [0, 5e-4, 1e-3]) for mark in (0, 5e-4, 1e-3)] == ["0", "5e-4", "1e-3"]


def test_moving_average_is_centred() -> None:
    line = [(step, float(step)) for step in range(9)]
    assert moving_average(line, 3) == line
    assert moving_average([(0, 0.0), (1, 3.0), (2, float("inf")), (3, 6.0)], 3) == [
        (0, 0.0),
        (1, 3.0),
        (3, 6.0),
    ]
