"""What every reader yields and everything later consumes: a conversation, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` overrides the run's `train_on` for this turn (None: follow the run)."""

    role: Role
    content: str
    trained: bool | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sample stands in its file: `line` counts from 1 (JSON arrays: the line its object starts on)."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path} line {self.line}"


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation (`messages`), or plain text (`text`, every token trained), never both.

    `extra` keeps keys that an evaluation needs and training does not, such as `database`.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    origin: Origin | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
