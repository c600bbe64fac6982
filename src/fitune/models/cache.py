"""The folder where fitune keeps what it can make again: stores of quantised weights."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fitune.errors import FituneError


def cache_folder() -> Path:
    """$FITUNE_CACHE, else $XDG_CACHE_HOME/fitune, else ~/.cache/fitune."""
    named = os.environ.get("FITUNE_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fitune"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` against other processes; waits for whoever holds it.

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
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        handle.close()
