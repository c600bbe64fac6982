"""Options, rows, and that a side which does not fit is told and not tried."""

from __future__ import annotations

from pathlib import Path

import paged_optimizer
import pytest
from paged_optimizer import Row


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--limit", "8"], "has no unit"),
        (["--sides", "tape"], "disk, memory are known"),
        (["--optimizer", "sgd"], "invalid choice"),
    ],
)
def test_odd_options_end_with_a_reason(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paged_optimizer.parse(arguments)
    assert reason in capsys.readouterr().err


def test_options() -> None:
    options = paged_optimizer.parse(["--limit", "7.5GB", "--sides", "disk"])
    assert (options.limit, options.sides) == (7_500_000_000, ["disk"])


def test_rows() -> None:
    row = Row("disk", 6 * 10**9, 5 * 10**9, 21.0, 8 * 10**9, [2.0, 1.5])
    assert paged_optimizer.row_cells(row) == ["disk", "6.00", "21.0", "8.0 GB", "2.0000 1.5000"]
    assert paged_optimizer.row_cells(Row("memory", problem="a\nb")) == ["memory", "-", "-", "-", "a b"]


def test_a_side_that_does_not_fit_is_told(tmp_path: Path) -> None:
    row = paged_optimizer.measured("memory", paged_optimizer.parse([]), tmp_path, tmp_path, 10**15)
    assert row.problem is not None
    assert row.problem.startswith("needs some 1000000 GB")
    assert list(tmp_path.iterdir()) == []
