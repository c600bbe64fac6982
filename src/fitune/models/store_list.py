"""The stores that lie in the cache: what they were made of, how large they are, and whether that is still there."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fitune.errors import FituneError, InputError
from fitune.models.cache import cache_folder
from fitune.models.find import find_model
from fitune.models.store_check import MANIFEST, check_files

# in use: its model is as it was. changed, gone: it is not, or not there. unfinished: a process that made it died.
# damaged: its files are not those that were written. unknown: the model cannot be told from here (a hub name, a
# relative path).
State = Literal["in use", "changed", "gone", "unfinished", "damaged", "unknown"]


@dataclass(frozen=True)
class StoreEntry:
    """One folder of the cache."""

    folder: Path
    model: str
    size_bytes: int
    made: datetime
    state: State

    @property
    def is_stale(self) -> bool:
        """Whether nothing is lost by deleting it: no model that is there would be read from it."""
        return self.state in ("changed", "gone", "unfinished", "damaged")


def list_stores() -> list[StoreEntry]:
    """All stores, the oldest first; not those that a process is just making.

    Reads manifests and headers, no weights; never uses the network.
    """
    root = cache_folder() / "stores"
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    entries = [entry for folder in folders if (entry := _entry(folder)) is not None]
    return sorted(entries, key=lambda entry: entry.made)


def _entry(folder: Path) -> StoreEntry | None:
    """None for a folder that is being made, or that was deleted meanwhile."""
    if _key(folder) != folder.name and _is_being_made(folder):
        return None
    try:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        made = datetime.fromtimestamp(folder.stat().st_mtime)
    except FileNotFoundError:
        return None
    # A folder gets its own name only when it is whole, and loses it before it is deleted.
    if _key(folder) != folder.name:
        return StoreEntry(folder, "?", size, made, "unfinished")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        model, fingerprint = str(manifest["reference"]), str(manifest["fingerprint"])
        damaged = _is_damaged(folder, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None if _is_being_made(folder) else StoreEntry(folder, "?", size, made, "damaged")
    return StoreEntry(folder, model, size, made, "damaged" if damaged else _state(model, fingerprint))


def _is_damaged(folder: Path, manifest: dict[str, Any]) -> bool:
    return bool(check_files(folder, manifest)) if manifest.get("files") else False


def delete_store(folder: Path) -> None:
    """Removes a store; it is made again when it is needed. Raises FituneError where that is not allowed.

    Processes that have it mapped keep it until they end. A store that another process is making is left alone.
    """
    try:
        with _lock_of(folder):
            if not folder.is_dir():  # whoever made a store of this key has cleared it away
                return
            # Out of the way first, so that no half of it can be taken for a store.
            doomed = folder.with_name(f".{_key(folder)}-deleted")
            if doomed != folder:
                shutil.rmtree(doomed, ignore_errors=True)
                folder.rename(doomed)
            shutil.rmtree(doomed)
    except BlockingIOError as error:
        raise FituneError(f"{folder} is being made by another process; delete it when that has ended") from error
    except OSError as error:
        raise FituneError(f"{folder} cannot be deleted: {error.strerror}") from error


def _key(folder: Path) -> str:
    """The store's key, from its own folder KEY or from one that is filled or deleted beside it (.KEY-...)."""
    name = folder.name
    return name[1:].rpartition("-")[0] or name[1:] if name.startswith(".") else name.split(".")[0]


@contextmanager
def _lock_of(folder: Path) -> Iterator[None]:
    """Holds the lock under which a store of this key is made. Raises BlockingIOError where another holds it."""
    lock = folder.with_name(f"{_key(folder)}.lock")
    if not lock.is_file():  # nobody ever made it here
        yield
        return
    with open(lock) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _is_being_made(folder: Path) -> bool:
    """Whether a process holds the lock under which this folder is written."""
    try:
        with _lock_of(folder):
            return False
    except BlockingIOError:
        return True


def _state(model: str, fingerprint: str) -> State:
    path = Path(model).expanduser()
    if model != "bundled" and not path.exists():
        return "gone" if path.is_absolute() else "unknown"
    try:
        return "in use" if find_model(model).fingerprint() == fingerprint else "changed"
    except InputError:
        return "gone"
