"""Facts on the screen: JSON that every reader takes, lines that line up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fitune.cli import output


def test_json_of_everything_that_facts_hold(capsys: pytest.CaptureFixture) -> None:
    output.print_json(
        {
            "loss": float("nan"),
            "sets": frozenset({"b", "a"}),
            "path": Path("/x"),
            "pair": (1, 2.5),
            "名": "值",
        }
    )
    out = capsys.readouterr().out
    assert out.endswith("}\n")
    assert json.loads(out) == {"loss": None, "sets": ["a", "b"], "path": "/x", "pair": [1, 2.5], "名": "值"}


def test_lines_and_tables_line_up(capsys: pytest.CaptureFixture) -> None:
    output.print_facts("This", {"a": "1", "long": "2"})
    output.print_table(["name", "n"], [["x", "10"], ["longer", "2"]])
    assert capsys.readouterr().out == "This\n  a     1\n  long  2\nname    n\nx       10\nlonger  2\n"
    assert output.gigabytes(1_900_000_000) == "1.90 GB"
