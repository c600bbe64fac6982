"""Writing files and folders so that they are there whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fitune.errors import DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that there is no room left (safetensors raises its own kind, with a text only)."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    found = re.search(r"\(os error (\d+)\)", str(error))
    return found is not None and int(found[1]) in _FULL


def write_text(path: Path, text: str) -> None:
    """Writes beside, syncs, renames. Raises DiskFullError with the old file (if any) untouched."""
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path` (which may be there) when the block ends well, and is gone when not.

    Raises DiskFullError with the old file (if any) untouched.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with open(beside, "rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(f"the disk ran full while {path} was written; nothing was changed") from error
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well, and is gone when it does not.

    An empty folder may stand there. With `replace` it takes the place of any folder that is there, which stays
    until the new one is whole on disk. Raises DiskFullError where the disk ran full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield beside
        _sync_tree(beside)
        os.chmod(beside, 0o755)
        if replace and path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            os.replace(path, old)
            try:
                os.rename(beside, path)
            except OSError:
                os.rename(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.rename(beside, path)
        _sync_folder(path.parent)
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(f"the disk ran full while {path} was written; nothing was kept of it") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        else:
            _sync_folder(file)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """A rename is on disk only when the folder that names it is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
