"""Every footgun on the page has tests, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_tests_are_there() -> None:
    lines = [line for line in (ROOT / "docs" / "footguns.md").read_text().splitlines() if line.startswith("| **")]
    assert len(lines) >= 8
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for line in lines:
        named = set(re.findall(r"`(test_\w+)`", line.split(" | ")[-1]))
        assert named, line
        assert named <= there, named - there
