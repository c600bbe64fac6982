"""Writing files and folders so that they are there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fitune.errors import DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_text(path: Path, text: str) -> None:
    """Writes beside, syncs, renames. Raises DiskFullError with the old file (if any) untouched."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        if error.errno in _FULL:
            raise DiskFullError(f"the disk ran full while {path} was written; nothing was changed") from error
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well, and is gone when it does not.

    Raises DiskFullError where the disk ran full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        os.chmod(beside, 0o755)
        os.rename(beside, path)
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(f"the disk ran full while {path} was written; nothing was kept of it") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
