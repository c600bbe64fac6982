"""What every reader yields and everything later consumes: a conversation, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant makes. `id` links it to its result; "": nothing does but the order."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        trained: overrides the run's `train_on` for this turn (None: follow the run).
        tool_calls: what the assistant calls in it.
        name, call_id: of a tool's result, the tool and the call that it answers, where the data say so.
    """

    role: Role
    content: str
    trained: bool | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sample stands in its file, counted from 1.

    Attributes:
        line: of a list in JSON, the line its object starts on.
        unit: "line", or "row" in files of tables.
    """

    path: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.path} {self.unit} {self.line}"


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation (`messages`), or plain text (`text`, every token trained), never both.

    Attributes:
        tools: definitions of what the assistant can call, as JSON schema functions.
        rejected: of a preference pair, the conversation with the worse answer; `messages` has the better one.
        label: of an answer judged by itself, whether it is good.
        extra: keys that an evaluation needs and training does not, such as `database`.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    origin: Origin | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
