"""Stores and processes: one that makes it while others want it, one that is killed, one that takes over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fitune.errors import FituneError
from fitune.models.find import find_model
from fitune.models.store import MANIFEST, open_store
from fitune.models.store_check import verify_store
from fitune.models.store_list import delete_store, list_stores
from tiny_models import BACKEND, write_model

# Makes a store; stops after so many tensors until its input says go on.
MAKING = """
import sys
from fitune.models.find import find_model
from fitune.models.store import open_store
def progress(done, total):
    if done == int(sys.argv[2]):
        print("made", done, flush=True)
        sys.stdin.readline()
print("started", flush=True)
print(open_store(find_model(sys.argv[1]), "reference", progress).folder)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


@pytest.fixture
def start() -> Iterator[Start]:
    running = []

    def start_one(model: Path, stop_after: int = -1) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", MAKING, str(model), str(stop_after)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        return process

    yield start_one
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def waits_for_a_lock(process: subprocess.Popen[str]) -> bool:
    """By the kernel's list of locks; blocked ones carry an arrow."""
    listed = Path("/proc/locks")
    if not listed.is_file():
        pytest.skip("this system does not list its locks")
    locks = [words.split() for words in listed.read_text().splitlines()]
    return any("->" in lock and str(process.pid) in lock for lock in locks)


def folders(stores: Path) -> list[Path]:
    return [path for path in stores.iterdir() if path.is_dir()]


def test_another_takes_over_when_the_maker_is_killed(tmp_path: Path, stores: Path, start: Start) -> None:
    model = write_model(tmp_path / "model")
    maker = start(model, 9)
    assert line(maker) == "started"
    assert line(maker) == "made 9"
    (half,) = folders(stores)
    assert half.name.startswith(".")
    # nobody takes the half for a store, or takes it away
    assert list_stores() == []
    with pytest.raises(FituneError, match="is being made by another process"):
        delete_store(half)
    waiting = start(model)
    assert line(waiting) == "started"
    while not waits_for_a_lock(waiting):
        assert waiting.poll() is None
        os.sched_yield()
    assert folders(stores) == [half]
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    made = Path(line(waiting))
    assert waiting.wait() == 0
    assert folders(stores) == [made]
    assert verify_store(made) == []
    assert [entry.state for entry in list_stores()] == ["in use"]


def test_killed_when_it_is_about_to_be_whole(tmp_path: Path, stores: Path, start: Start) -> None:
    """As soon as its manifest is there: before, or just after, the folder gets its name."""
    model = write_model(tmp_path / "model")
    maker = start(model)
    assert line(maker) == "started"
    while maker.poll() is None and not list(stores.glob(f".*/{MANIFEST}")):
        os.sched_yield()
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    whole = [folder for folder in folders(stores) if not folder.name.startswith(".")]
    assert all(verify_store(folder) == [] for folder in whole)  # it may have been quicker than we
    states = [entry.state for entry in list_stores()]
    assert states == ["in use" if whole else "unfinished"]
    store = open_store(find_model(str(model)), BACKEND)
    assert folders(stores) == [store.folder]
    assert verify_store(store.folder) == []
