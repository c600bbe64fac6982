"""A file is a room: its name says its subject, no other has it, and it is not too long."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "fitune"
DRAWERS = {
    "utils",
    "util",
    "helpers",
    "helper",
    "common",
    "core",
    "base",
    "misc",
    "manager",
    "shared",
    "stuff",
}
MOST_LINES = 500


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def drawers(paths: list[Path]) -> list[str]:
    """Files and folders whose name, or a part of it, says nothing of what is inside."""
    return [str(path) for path in paths if any(DRAWERS & set(part.split("_")) for part in path.with_suffix("").parts)]


def test_no_junk_drawers() -> None:
    assert drawers([path.relative_to(SOURCE) for path in files()]) == []
    assert drawers([Path("data/text_utils.py"), Path("core/loop.py"), Path("data/pack.py")]) == [
        "data/text_utils.py",
        "core/loop.py",
    ]


def test_every_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in files() if path.name != "__init__.py")
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_kernels_files_are_not_too_long() -> None:
    paths = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_file_says_what_it_is_about() -> None:
    """A docstring first; an empty __init__.py has nothing to say."""
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files()}
    silent = [
        path for path, text in texts.items() if text.strip() and not text.startswith('"""') and "__main__" not in path
    ]
    assert silent == []
