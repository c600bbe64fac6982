"""The folder where fitune keeps what it can make again: stores of quantised weights, tokens of large files."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fitune.errors import FituneError

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$FITUNE_CACHE, else $XDG_CACHE_HOME/fitune, else ~/.cache/fitune."""
    named = os.environ.get("FITUNE_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fitune"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` against other processes; waits, and says so, for whoever holds it.

    Raises FituneError where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w")  # noqa: SIM115 - closed below, after the lock is given back
    except OSError as error:
        raise FituneError(
            f"the cache folder {path.parent} cannot be written ({error.strerror}); "
            "set FITUNE_CACHE to a folder that can"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another process, which is writing %s", path.with_suffix(""))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        handle.close()


def remove_unfinished(path: Path) -> None:
    """Removes what killed processes left of `atomic.new_folder(path)`, and of others beside it that nobody writes.

    Only for those who hold the lock on `path`.
    """
    for left in path.parent.glob(".*-*"):
        name = left.name[1:].rpartition("-")[0]
        if name == path.name:
            shutil.rmtree(left)
            continue
        try:
            with open(path.with_name(name).with_suffix(".lock")) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # being written, or no folder of ours
            continue
