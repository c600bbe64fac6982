"""What readers of files yield: records with their places, and what is wrong in a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fitune.errors import InputError

SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file and its place, counted from 1: the line it starts on, or (in tables) its row."""

    line: int
    value: Any


@dataclass(slots=True)
class Problems:
    """What is wrong in one file: the first `SHOWN_PROBLEMS` in words, the rest as a count.

    `unit`: what its places count, "line" or "row".
    """

    where: str
    unit: str = "line"
    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, message: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(f"{self.unit} {line}: {message}")

    def raise_if_any(self) -> None:
        """Raises InputError with every problem collected so far."""
        if self.count:
            more = self.count - len(self.shown)
            raise InputError([*self.shown, *([f"and {more} more"] if more else [])], where=self.where)
