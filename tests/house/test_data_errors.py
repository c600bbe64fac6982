"""docs/data-errors.md is what is said of each mistake."""

from __future__ import annotations

from pathlib import Path

from script_modules import script

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_says_what_is_said() -> None:
    written = (ROOT / "docs" / "data-errors.md").read_text(encoding="utf-8")
    assert written == script("write_data_errors").page(), "run: python scripts/write_data_errors.py"
