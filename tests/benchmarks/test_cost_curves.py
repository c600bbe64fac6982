"""The points of the curves, and that a point is a process of our side alone."""

from __future__ import annotations

from pathlib import Path

import cost_curves
import pytest
from speed_alone import Figures
from tiny_case import tiny_inputs


def test_the_curves_go_where_they_should() -> None:
    found = cost_curves.curves(threads=2, most_threads=3)
    assert {point.tokens for point in found["length"].values()} == {8192}
    assert [point.row_tokens for point in found["length"].values()] == list(cost_curves.SIZES)
    assert [point.tokens for point in found["tokens"].values()] == list(cost_curves.SIZES)
    assert {point.row_tokens for point in found["tokens"].values()} == {256}
    assert [point.rank for point in found["rank"].values()] == [4, 8, 16, 32, 64, 128]
    assert [point.threads for point in found["threads"].values()] == [1, 2, 3]
    assert found["threads"][2] == found["rank"][16]  # measured once
    assert found["tokens"][8192] == found["length"][256]


@pytest.mark.slow
def test_a_point_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    point = cost_curves.Point(2, 64, 8, 1)
    figures = cost_curves.measured(point, tiny_inputs(tmp_path), "float32", 1)
    assert figures.tokens_per_second == pytest.approx(point.tokens / figures.step_seconds[0])
    assert figures.peak_bytes >= figures.load_peak_bytes > 10**8


def test_rows_tell_curve_value_and_figures() -> None:
    point = cost_curves.Point(4, 512, 16, 2)
    row = cost_curves.row_of("rank", 16, point, Figures(1000.0, 10**9, 10**8, 3.0, [2.048]))
    assert row.items() >= {"curve": "rank", "value": 16, "tokens": 2048, "peak_bytes": 10**9}.items()
    assert cost_curves.row_cells(row) == ["16", "1,000", "2,048", "1.00"]
    assert cost_curves.row_cells(cost_curves.row_of("rank", 16, point, "failed:\nwhy"))[-1] == "failed: why"


def test_an_unknown_curve_ends_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_curves.parse(["--only", "rank,threads"]).only == ["rank", "threads"]
    with pytest.raises(SystemExit):
        cost_curves.parse(["--only", "luck"])
    assert "no curve called luck" in capsys.readouterr().err
