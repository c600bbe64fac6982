"""What a run shows: few plain lines where nobody watches, a picture on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from fitune.train.loop import Record, StepRecord, ValidationRecord
from fitune.train.progress_view import MOST_LINES, TrainingView, clock
from fitune.train.scoring import ScoreRecord


def step(number: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(number, 0.5, loss, 1.0, 2e-4, 100, 50, 200.0, 1_500_000_000, number * 0.5)


def shown(is_terminal: bool, records: list[Record], steps: int, width: int = 200) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=width, highlight=False)
    with TrainingView(steps, 2_000_000_000, console) as view:
        view.quantising(1, 2)
        view.quantising(2, 2)
        view.say("a line [that] stays")
        for record in records:
            view(record)
    return file.getvalue()


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_plain_lines_are_few_and_hold_the_ends(steps: int) -> None:
    records: list[Record] = []
    for number in range(1, steps + 1):
        records += [step(number), ValidationRecord(number, 0.5)]
    said = shown(False, records, steps)
    assert said.count("\n") <= MOST_LINES + 3
    assert "a line [that] stays" in said
    assert f"step 1/{steps}, loss 1.0000" in said
    assert f"step {steps}/{steps}, " in said
    assert said.endswith(f"step {steps}/{steps}  validation loss 0.5000\n")


def test_a_line_holds_everything() -> None:
    said = shown(False, [step(1, 3.0), step(2, 1.0)], 2).splitlines()[-1]
    assert said == (
        "step 2/2, loss 1.0000 (mean 2.0000), learning rate 2.00e-04, gradient norm 1, 200 tokens/s, "
        "memory 1.50 of 2.00 GB planned, 0:01 gone, 0:00 left"
    )


def test_a_resumed_run_is_timed_by_its_own_steps() -> None:
    """The seconds of a record count from the run's beginning; what is left must not."""
    said = shown(False, [StepRecord(90, 1, 1.0, 1.0, 1e-4, 100, 50, 50.0, 10**9, 5000.0)], 100)
    assert "1:23:20 gone, 0:20 left" in said


def test_a_terminal_gets_a_picture() -> None:
    said = shown(True, [step(1), ValidationRecord(1, 0.25), step(2)], 4)
    assert "validation 0.2500" in said
    assert "step 2/4" in said
    assert "quantising 2/2 tensors" in said


@pytest.mark.parametrize(
    ("name", "score", "words"),
    [("execution_accuracy", 0.42, "execution accuracy 42.0 % (29.0 to 55.0) on 50 answers"),
     ("bleu", 31.25, "BLEU 31.2 (0.3 to 0.6) on 50 answers")],
)  # fmt: skip
def test_scores_stand_in_lines_and_pictures(name: str, score: float, words: str) -> None:
    record = ScoreRecord(1, score, name, 0.29, 0.55, {name: score}, 50, 3, 12.5)
    assert words in shown(True, [step(1), record, step(2)], 4)
    lines = shown(False, [step(1), record, step(2)], 2).splitlines()
    assert words in lines[-1]
    assert words not in lines[-2]
    last = ScoreRecord(2, score, name, 0.29, 0.55, {name: score}, 50, 3, 12.5)
    assert shown(False, [step(1), step(2), last], 2).endswith(f"step 2/2  {words}\n")


def test_a_narrow_terminal_gets_whole_facts() -> None:
    """No line is wider than the terminal, which would break it and show it as two."""
    record = StepRecord(
        12_345, 0.5, 1.25, 0.4321, 2e-4, 100, 50, 12_200.0, 15_500_000_000, 51_100.0, 0.75, 0.1234, 0.624
    )
    said = shown(True, [ValidationRecord(1, 0.25), record], 100_000, width=80)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip("\r") for line in said.splitlines()]
    assert max(map(len, lines)) <= 80
    for fact in (
        "step 12345/100000", "validation 0.2500", "learning rate 2.00e-04", "gradient norm 0.432",
        "12,200 tokens/s (62% of the machine's products)", "memory 15.50 of 2.00 GB planned",
        "75% judged right (margin +0.123)", "14:11:40 gone",
    ):  # fmt: skip
        assert any(fact in line for line in lines), fact


def test_clock() -> None:
    assert [clock(7), clock(760), clock(11_100)] == ["0:07", "12:40", "3:05:00"]
