"""What was found in samples while they were encoded: counts, and sentences with the lines they are about."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fitune.data.record import SHOWN_PROBLEMS

# Sentences kept of one file; the others are counted.
KEPT_NOTES = 10_000


@dataclass(slots=True)
class Tally:
    """Counts are of samples; `DataReport` says what each means.

    Attributes:
        notes: (line, sentence) of the first `KEPT_NOTES`; more_notes: how many others.
        refused: of the first few samples that cannot be encoded, where and why; more_refused: how many others.
        suspicious: what kinds of strange text were found how often.
    """

    samples: int = 0
    split: int = 0
    cut: int = 0
    dropped: int = 0
    empty: int = 0
    nothing_to_train: int = 0
    without_end_token: int = 0
    lost_end: int = 0
    control_tokens: int = 0
    lost_characters: int = 0
    suspicious: Counter[str] = field(default_factory=Counter)
    notes: list[tuple[int, str]] = field(default_factory=list)
    more_notes: int = 0
    refused: list[str] = field(default_factory=list)
    more_refused: int = 0

    def note(self, line: int, sentence: str) -> None:
        """Something to know about the sample of a line."""
        if len(self.notes) < KEPT_NOTES:
            self.notes.append((line, sentence))
        else:
            self.more_notes += 1

    def refuse(self, sentence: str) -> None:
        """A sample cannot be encoded."""
        if len(self.refused) < SHOWN_PROBLEMS:
            self.refused.append(sentence)
        else:
            self.more_refused += 1

    def add(self, other: Tally) -> None:
        """Takes in what was found in samples that come after these."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.suspicious.update(other.suspicious)
        for line, sentence in other.notes:
            self.note(line, sentence)
        for sentence in other.refused:
            self.refuse(sentence)

    def as_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        """What `as_json` made."""
        notes = [(line, sentence) for line, sentence in values["notes"]]
        return cls(**{**values, "suspicious": Counter(values["suspicious"]), "notes": notes})


_COUNTS = (
    "samples", "split", "cut", "dropped", "empty", "nothing_to_train", "without_end_token", "lost_end",
    "control_tokens", "lost_characters", "more_notes", "more_refused",
)  # fmt: skip
