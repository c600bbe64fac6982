"""The tables of results are those of the result files."""

from __future__ import annotations

import re
from pathlib import Path

from script_modules import script

ROOT = Path(__file__).resolve().parents[2]


def test_pages_are_what_the_files_say() -> None:
    for path, text in script("write_benchmark_docs").pages().items():
        assert path.read_text(encoding="utf-8") == text, "run: python scripts/write_benchmark_docs.py"


def test_every_file_of_results_is_on_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"(../benchmarks/results/{path.name})" in pages
        assert not re.search(r"/(root|home|work|tmp)/", path.read_text(encoding="utf-8")), f"{path} names a folder"


def test_both_readmes_have_the_table() -> None:
    pages = script("write_benchmark_docs")
    for name in pages.README_COLUMNS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert pages.README_MARK.search(text)
        assert pages.readme(name, text.replace(" x)", " y)")) == text
