"""A file that is only added to; what finds no room on the disk waits in memory until there is some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fitune.atomic import is_disk_full


class PatientFile:
    """Opened at once; `say` gets a line when the disk is full, once until it has room again."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close
        self._waiting = b""
        self._said = False

    def write(self, content: bytes) -> None:
        """Adds to the file, after what still waits."""
        self._waiting += content
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._said = False
        except OSError as error:
            if not is_disk_full(error):
                raise
            if not self._said:
                self._say(f"warning: the disk is full; what belongs into {self._path} waits until there is room")
            self._said = True

    def close(self) -> None:
        """Says what is lost, if anything still waits."""
        if self._waiting:
            self.write(b"")
        if self._waiting:
            self._say(f"warning: the disk is full; {len(self._waiting)} bytes for {self._path} were lost")
        self._file.close()
