"""docs/data-errors.md is what is said of each mistake."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_data_errors", ROOT / "scripts" / "write_data_errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["write_data_errors"] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_is_said() -> None:
    written = (ROOT / "docs" / "data-errors.md").read_text(encoding="utf-8")
    assert written == script().page(), "run: python scripts/write_data_errors.py"
