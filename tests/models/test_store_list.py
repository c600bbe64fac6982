"""The list of stores: the state of each, what is deleted, and a cache that cannot be written."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fitune.errors import FituneError
from fitune.models.find import find_model
from fitune.models.store import MANIFEST, Store, open_store
from fitune.models.store_list import StoreEntry, delete_store, list_stores
from tiny_models import BACKEND, write_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def store(model: Path) -> Store:
    return open_store(find_model(str(model)), BACKEND)


def the_entry() -> StoreEntry:
    found = list_stores()
    assert len(found) == 1
    return found[0]


def test_no_cache_no_stores(cache: Path) -> None:
    assert list_stores() == []
    (cache / "stores").mkdir(parents=True)
    assert list_stores() == []


def test_place_size_model_and_order(store: Store, model: Path, tmp_path: Path) -> None:
    entry = the_entry()
    assert entry.folder == store.folder
    assert entry.model == str(model)
    files = store.manifest["files"]
    assert (
        entry.size_bytes == sum(file["bytes"] for file in files.values()) + (store.folder / MANIFEST).stat().st_size
    )
    assert (entry.state, entry.is_stale) == ("in use", False)
    os.utime(store.folder, (2**30, 2**30))
    second = open_store(find_model(str(write_model(tmp_path / "another", "qwen2"))), BACKEND)
    found = list_stores()
    assert [entry.folder for entry in found] == [store.folder, second.folder]
    assert found[0].made < found[1].made


def test_a_model_that_changed_and_one_that_is_gone(store: Store, model: Path) -> None:
    os.utime(model / "model.safetensors", (1, 1))
    assert (the_entry().state, the_entry().is_stale) == ("changed", True)
    (model / "model.safetensors").unlink()  # what is left of the folder is no model
    assert the_entry().state == "gone"
    shutil.rmtree(model)
    assert (the_entry().state, the_entry().is_stale) == ("gone", True)


def test_damaged_stores(store: Store) -> None:
    file = store.folder / "model-00002-of-00003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert (the_entry().state, the_entry().is_stale) == ("damaged", True)
    file.write_bytes(b"\xff" * 8 + content[8:])  # the header's length
    assert the_entry().state == "damaged"
    file.write_bytes(content)
    assert the_entry().state == "in use"
    manifest = (store.folder / MANIFEST).read_text()
    for torn in ("", manifest[:-9], "[]", "null"):
        (store.folder / MANIFEST).write_text(torn)
        assert (the_entry().state, the_entry().model) == ("damaged", "?")
    (store.folder / MANIFEST).unlink()
    assert the_entry().state == "damaged"


@pytest.mark.parametrize("left", [".{key}-a8_1x", ".{key}-deleted", "{key}.making-deleted"])
def test_what_dead_processes_left(store: Store, model: Path, left: str) -> None:
    """Half-written, or half-deleted with its manifest still there."""
    folder = store.folder.rename(store.folder.with_name(left.format(key=store.folder.name)))
    assert (the_entry().folder, the_entry().state, the_entry().is_stale) == (folder, "unfinished", True)
    delete_store(folder)
    assert list_stores() == []
    assert open_store(find_model(str(model)), BACKEND).folder == store.folder
    assert the_entry().state == "in use"


@pytest.fixture
def maker(store: Store) -> Iterator[None]:
    """Somebody holds the lock under which stores of this key are made."""
    with open(store.folder.with_suffix(".lock")) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@pytest.mark.usefixtures("maker")
def test_a_store_that_is_being_made_is_neither_listed_nor_deleted(store: Store) -> None:
    filling = store.folder.rename(store.folder.with_name(f".{store.folder.name}-a8_1x"))
    assert list_stores() == []
    with pytest.raises(FituneError, match="is being made by another process"):
        delete_store(filling)
    assert (filling / MANIFEST).is_file()


def test_deleting_one_leaves_the_others_and_those_who_read_it(store: Store, model: Path, tmp_path: Path) -> None:
    other = open_store(find_model(str(write_model(tmp_path / "another", "qwen2"))), BACKEND)
    name = "model.layers.1.mlp.up_proj.weight"
    before = store.tensor(name)
    copy = before.clone()
    delete_store(store.folder)
    assert torch.equal(before, copy)  # mapped files stay until they are let go
    assert the_entry().folder == other.folder
    delete_store(store.folder)  # a second time: nothing to do
    again = open_store(find_model(str(model)), BACKEND)
    assert torch.equal(again.tensor(name), copy)


@pytest.fixture
def read_only(store: Store, cache: Path) -> Iterator[Path]:
    """The cache with one store in it, as a file system that cannot be written; for root a mount is needed."""
    if os.geteuid():
        for folder in (cache, cache / "stores", store.folder):
            folder.chmod(0o555)
        yield cache
        for folder in (cache, cache / "stores", store.folder):
            folder.chmod(0o755)
        return
    for options in (["--bind", str(cache), str(cache)], ["-o", "remount,ro,bind", str(cache)]):
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
        if done.returncode:
            subprocess.run(["umount", str(cache)], capture_output=True, check=False)
            pytest.skip(f"nothing can be mounted read-only here: {done.stderr.strip()}")
    yield cache
    subprocess.run(["umount", "--lazy", str(cache)], check=True)  # files of it may still be mapped


def test_a_store_in_a_read_only_cache_is_used(store: Store, model: Path, read_only: Path) -> None:
    with pytest.raises(OSError, match=r"."):
        (read_only / "stores" / "x").touch()
    again = open_store(find_model(str(model)), BACKEND)
    assert again.folder == store.folder
    assert again.weight_map == store.weight_map
    for name in again.weight_map:
        assert torch.equal(again.tensor(name), store.tensor(name))
    assert the_entry().state == "in use"


def test_making_or_deleting_in_a_read_only_cache_says_what_to_do(
    store: Store, tmp_path: Path, read_only: Path
) -> None:
    source = find_model(str(write_model(tmp_path / "another", "qwen2")))
    with pytest.raises(
        FituneError, match=r"cache folder .* cannot be written .*set FITUNE_CACHE to a folder that can"
    ):
        open_store(source, BACKEND)
    with pytest.raises(FituneError, match="cannot be deleted: "):
        delete_store(store.folder)
    assert the_entry().state == "in use"
