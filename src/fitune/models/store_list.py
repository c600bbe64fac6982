"""The stores that lie in the cache: what they were made of, how large they are, and whether that is still there."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from fitune.errors import FituneError, InputError
from fitune.models.cache import cache_folder
from fitune.models.find import find_model
from fitune.models.store import MANIFEST

# in use: its model is as it was. changed, gone: it is not, or not there. unfinished: a process that made it died.
# unknown: that cannot be told from here (a hub name, a relative path).
State = Literal["in use", "changed", "gone", "unfinished", "unknown"]


@dataclass(frozen=True)
class StoreEntry:
    """One folder of the cache."""

    folder: Path
    model: str
    size_bytes: int
    made: datetime
    state: State


def list_stores() -> list[StoreEntry]:
    """All stores, the oldest first. Reads no weights and never uses the network."""
    root = cache_folder() / "stores"
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    entries = []
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        made = datetime.fromtimestamp(folder.stat().st_mtime)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            model, fingerprint = str(manifest["reference"]), str(manifest["fingerprint"])
        except (OSError, ValueError, KeyError):
            if not _is_being_made(folder):
                entries.append(StoreEntry(folder, "?", size, made, "unfinished"))
            continue
        entries.append(StoreEntry(folder, model, size, made, _state(model, fingerprint)))
    return sorted(entries, key=lambda entry: entry.made)


def delete_store(folder: Path) -> None:
    """Removes a store; it is made again when it is needed. Raises FituneError where that is not allowed.

    Processes that have it mapped keep it until they end.
    """
    try:
        # Out of the way first, so that no half of it can be taken for a store.
        doomed = folder.with_name(f"{folder.name.split('.')[0]}.making-deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise FituneError(f"{folder} cannot be deleted: {error.strerror}") from error


def _state(model: str, fingerprint: str) -> State:
    path = Path(model).expanduser()
    if model != "bundled" and not path.exists():
        return "gone" if path.is_absolute() else "unknown"
    try:
        return "in use" if find_model(model).fingerprint() == fingerprint else "changed"
    except InputError:
        return "gone"


def _is_being_made(folder: Path) -> bool:
    """Whether a process holds the lock under which this folder is written."""
    lock = folder.with_name(f"{folder.name.split('.')[0]}.lock")
    if not lock.is_file():
        return False
    with open(lock) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
