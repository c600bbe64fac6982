"""Distances between runs, what counts as agreement, and the sides in processes of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import loss_agreement
import pytest
from loss_agreement import Row
from speed_rounds import Method
from tiny_case import tiny_inputs


def test_agreement_is_measured_by_the_peer() -> None:
    exact = [3.0, 2.0, 1.0]
    rows = [
        Row("a", "float32", exact),
        Row("a", "pure bf16", [3.1, 2.0, 1.0]),
        Row("a", "bf16 autocast", [3.0, 2.06, 1.06]),
        Row("a", "fitune, bfloat16", [3.0, 2.1, 1.0]),
        Row("a", "fitune, int8", [3.1, 2.1, 1.1]),
        Row("a", "fitune, float32", [3.2, 2.0, 1.0]),
    ]
    for row in rows:
        row.measure(exact, rows[1].losses)
    assert rows[3].mean_distance == pytest.approx(0.1 / 3)
    assert rows[3].largest_from_peer == pytest.approx(0.1)
    assert loss_agreement.agrees(rows, "fitune, bfloat16")
    assert not loss_agreement.agrees(rows, "fitune, int8")  # on average further
    assert not loss_agreement.agrees(rows, "fitune, float32")  # once further
    assert loss_agreement.row_cells(rows[3])[2:5] == ["3.0000", "1.0000", "0.03333"]
    assert "gone" in loss_agreement.row_cells(Row("a", "b", problem="gone"))[-1]


@pytest.mark.slow
def test_the_sides_start_alike(tmp_path: Path) -> None:
    """In float32 ours and the peer's losses are the same numbers, from the first step to the last."""
    inputs = replace(tiny_inputs(tmp_path), adapter=tmp_path / "adapter")
    rows = loss_agreement.rows_of(inputs, ["float32"], Method(2, 0, 0, threads=1))
    assert [row.problem for row in rows] == [None] * 4
    ours = rows[-1]
    assert ours.largest_distance is not None
    assert ours.largest_distance < 1e-5
    assert rows[1].largest_distance > ours.largest_distance
    assert rows[0].largest_distance == 0.0
