"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fitune.atomic import new_folder, write_text


def fill(path: Path, words: str, replace: bool = False) -> None:
    with new_folder(path, replace) as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "file").write_text(words)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    with new_folder(path) as beside:
        (beside / "file").write_text("x")
        assert not path.exists()
    assert os.listdir(path) == ["file"]
    assert os.listdir(path.parent) == ["folder"]
    assert path.stat().st_mode & 0o777 == 0o755


def test_only_an_empty_folder_is_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    fill(path, "first")
    with pytest.raises(OSError, match="not empty"):
        fill(path, "second")
    assert (path / "inner" / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["folder"]
    fill(path, "second", replace=True)
    assert (path / "inner" / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["folder"]


def fail(path: Path, replace: bool, error: type[BaseException]) -> None:
    with new_folder(path, replace) as beside:
        (beside / "file").write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("replace", [True, False])
def test_what_goes_wrong_leaves_what_was_there(tmp_path: Path, error: type[BaseException], replace: bool) -> None:
    path = tmp_path / "folder"
    fill(path, "old")
    with pytest.raises(error):
        fail(path, replace, error)
    assert (path / "inner" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "file", "three")
