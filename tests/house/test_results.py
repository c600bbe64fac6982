"""The tables of results are those of the result files."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "write_benchmark_docs", ROOT / "scripts" / "write_benchmark_docs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    return module


def test_pages_are_what_the_files_say() -> None:
    for path, text in script().pages().items():
        assert path.read_text(encoding="utf-8") == text, "run: python scripts/write_benchmark_docs.py"


def test_every_file_of_results_is_on_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"(../benchmarks/results/{path.name})" in pages
        assert not re.search(r"/(root|home|work|tmp)/", path.read_text(encoding="utf-8")), f"{path} names a folder"


def test_both_readmes_have_the_table() -> None:
    for name in script().README_COLUMNS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert script().README_MARK.search(text)
        assert script().readme(name, text.replace(" x)", " y)")) == text
