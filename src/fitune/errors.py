"""What can go wrong, as exceptions a person can read.

`InputError` is the user's input (exit code 2); every other `FituneError` is our failure (exit code 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class FituneError(Exception):
    """A failure that is explained in one clear sentence; the command line prints it without a traceback."""

    exit_code = 1


class InputError(FituneError):
    """Something the user gave cannot be used.

    One error carries all the independent problems that were found in one place.

    Attributes:
        where: the file, option or thing at fault, as the user knows it (None: no single place).
        problems: one sentence each: where inside, what was found, what is allowed, what to do.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str], where: str | Path | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.where = None if where is None else str(where)
        super().__init__(str(self))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0] if self.where is None else f"{self.where}: {self.problems[0]}"
        head = f"{len(self.problems)} problems"
        lines = [f"  {problem}" for problem in self.problems]
        return "\n".join([head if self.where is None else f"{self.where}: {head}", *lines])


class DiskFullError(FituneError):
    """The disk ran full, or would; nothing half-written was left in place of something whole."""


class Interrupted(FituneError):  # noqa: N818 - it is no error
    """The user asked to stop (Ctrl-C or SIGTERM); the message says what was saved and how to go on."""

    exit_code = 130


class MemoryShortError(FituneError):
    """Memory ran short while a run went on; the message says what was saved and how to go on."""
