"""A store compared with its manifest: everything that can happen to a file is named, and nothing else is."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from fitune.errors import FituneError
from fitune.models import store as store_room
from fitune.models.find import find_model
from fitune.models.store import open_store
from fitune.models.store_check import INDEX, MANIFEST, check_files, read_manifest, verify_store
from tiny_models import BACKEND, write_model

LAYER = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FITUNE_CACHE", str(folder / "cache"))
        return open_store(find_model(str(write_model(folder / "model"))), BACKEND).folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def test_a_whole_store_has_no_problems(whole: Path) -> None:
    assert (MANIFEST, INDEX) == (store_room.MANIFEST, store_room.INDEX)
    manifest = read_manifest(whole)
    assert check_files(whole, manifest) == []
    seen: list[tuple[int, int]] = []
    assert verify_store(whole, lambda done, total: seen.append((done, total))) == []
    total = sum(path.stat().st_size for path in whole.iterdir() if path.name != MANIFEST)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [-1, -5000, 9])
def test_one_flipped_bit_is_found(folder: Path, place: int) -> None:
    """In the last weight, in the middle, in the header; sizes stay the same."""
    flip(folder / LAYER, place)
    problems = verify_store(folder)
    assert len(problems) == 1
    assert problems[0].startswith(f"{LAYER} is not what was written (its SHA-256 is ")


def test_a_flipped_weight_is_beyond_the_cheap_look(folder: Path) -> None:
    flip(folder / LAYER, -1)
    assert check_files(folder, read_manifest(folder)) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, r"has \d+ bytes, \d+ were written"),
        (grow, r"has \d+ bytes, \d+ were written"),
        (Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("name", [LAYER, INDEX, "config.json"])
def test_cut_grown_and_missing_files_are_named_by_both(
    folder: Path, harm: Callable[[Path], None], words: str, name: str
) -> None:
    harm(folder / name)
    manifest = read_manifest(folder)
    for problems in (check_files(folder, manifest), verify_store(folder)):
        assert len(problems) == 1
        assert problems[0].startswith(f"{name} ")
        assert re.search(words, problems[0])


def test_every_problem_is_told_at_once_and_strange_files_too(folder: Path) -> None:
    cut(folder / LAYER)
    (folder / "config.json").unlink()
    flip(folder / "model-00003-of-00003.safetensors", -1)
    (folder / "notes.txt").write_text("mine")
    problems = verify_store(folder)
    assert [problem.split()[0] for problem in problems] == [
        "notes.txt", "config.json", LAYER, "model-00003-of-00003.safetensors"
    ]  # fmt: skip


def rewritten(folder: Path, name: str, content: bytes) -> None:
    """A file that the manifest agrees with in size, as a bug in the writer would leave it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name]["bytes"] = len(content)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged header"),
        (struct.pack("<Q", 2**40) + b"{}", "damaged header"),
        (struct.pack("<Q", 9) + b"not json!", "damaged header"),
        (struct.pack("<Q", 2) + b"[]", "damaged header"),
        (struct.pack("<Q", 2) + b"{}" + bytes(64), "has 74 bytes, its header accounts for 10"),
        (struct.pack("<Q", 2) + b"{}", "tensors of model.safetensors.index.json (first: model.layers.0."),
    ],
)
def test_a_header_that_does_not_fit_is_found_without_reading_weights(
    folder: Path, content: bytes, words: str
) -> None:
    rewritten(folder, LAYER, content)
    problems = check_files(folder, read_manifest(folder))
    assert any(words in problem and problem.startswith(LAYER) for problem in problems), problems


def test_an_index_that_does_not_fit_is_found(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = next(name for name, file in index["weight_map"].items() if file == LAYER)
    del index["weight_map"][name]
    index["weight_map"]["elsewhere"] = "model-9.safetensors"
    rewritten(folder, INDEX, json.dumps(index).encode())
    problems = check_files(folder, read_manifest(folder))
    assert f"{LAYER} holds 1 tensors unknown to {INDEX} (first: {name})" in problems
    assert f"{INDEX} names model-9.safetensors, which is not part of the store" in problems
    rewritten(folder, INDEX, b"{")
    assert check_files(folder, read_manifest(folder))[0].startswith(f"{INDEX} cannot be read")


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", '{"files": {"a": 1}}', '{"files": {"a": {"bytes": 1}}}']
)
def test_a_manifest_that_cannot_be_read(folder: Path, content: str | None) -> None:
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_text(content)
    with pytest.raises(FituneError, match=r"is damaged: store.json cannot be read .*delete the folder"):
        read_manifest(folder)
    assert len(verify_store(folder)) == 1
