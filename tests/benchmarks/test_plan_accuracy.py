"""The cases, and that a row holds what the plan said and what the run then took."""

from __future__ import annotations

import json
from pathlib import Path

import plan_accuracy
import pytest
from plan_accuracy import Case, Row


def test_there_are_as_many_cases_as_the_documents_say() -> None:
    cases = list(plan_accuracy.CASES.values())
    assert len(cases) >= 24
    assert {case.method for case in cases} == {"qlora", "lora", "full"}
    assert {case.recompute for case in cases} == {"none", "layers"}
    assert {case.compute for case in cases} == {"bfloat16", "int8"}
    assert len({case.model for case in cases}) == 2
    assert len(plan_accuracy.parse(["--quick"]).cases) == 4


def test_an_unknown_case_ends_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan_accuracy.parse(["--cases", "luck"])
    assert "no case called luck" in capsys.readouterr().err


def test_there_is_text_for_every_step(tmp_path: Path) -> None:
    plan_accuracy.write_text(tmp_path / "text.jsonl", 10_000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert sum(len(text.split()) for text in texts) >= 10_000
    assert len(set(texts)) == len(texts)


def test_rows_tell_both_figures_and_their_ratio() -> None:
    assert plan_accuracy.row_cells(Row("a", 10**9, 2 * 10**9, 3.0, 2.0)) == [
        "a", "1.00", "2.00", "0.50", "3.00", "2.00", "1.50", "0%",
    ]  # fmt: skip
    assert plan_accuracy.row_cells(Row("a", problem="fitune train:\nwhy"))[-1] == "fitune train: why"


def test_a_case_is_measured_again_only_while_the_machine_moves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drifts = iter([0.11, 0.02, 0.0])
    monkeypatch.setattr(
        plan_accuracy, "measured", lambda case, *_: Row(case.name, 10**9, 2 * 10**9, 9.0, 1.0, drift=next(drifts))
    )
    case = next(iter(plan_accuracy.CASES.values()))
    assert plan_accuracy.steadily_measured(case, tmp_path, tmp_path, 3, None).drift == 0.02
    drifts = iter([0.5] * 9)
    assert plan_accuracy.steadily_measured(case, tmp_path, tmp_path, 3, None).drift == 0.5
    assert len(list(drifts)) == 9 - plan_accuracy.TRIES


def test_a_machine_has_a_rate() -> None:
    assert 1e8 < plan_accuracy.machine_rate(1) < 1e14


@pytest.mark.slow
def test_a_case_is_planned_and_trained(tmp_path: Path) -> None:
    case = Case(plan_accuracy.TEXT_MODEL, "qlora", 1, 64, compute="auto")
    row = plan_accuracy.measured(case, tmp_path, tmp_path, rounds=2, threads=1)
    assert 0.5 < row.bytes_ratio < 2.0
    assert row.predicted_seconds > 0
    assert row.measured_seconds > 0
