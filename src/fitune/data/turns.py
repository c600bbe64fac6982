"""The turns of a chat as ShareGPT and OpenAI write them, tool calls and their results included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fitune.data.conversation import Message, Role, ToolCall
from fitune.data.fields import RecordError, keys_of, kind_of_value, string

# Roles as the ShareGPT and OpenAI styles spell them.
ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_OF_A_TURN = frozenset({"weight", "tool_calls", "name", "tool_call_id"})


def messages_of(turns: Any, name: str) -> list[Message]:
    """A list of turns -> messages. Raises RecordError with the number of the turn that does not fit."""
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind_of_value(turns)
        raise RecordError(f"{name} must be a list of turns, found {found}")
    return [message_of(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]


def message_of(turn: Any, name: str) -> Message:
    """One turn -> a message."""
    if not isinstance(turn, dict):
        raise RecordError(f"{name} must be an object, found {kind_of_value(turn)}")
    if "from" in turn and "value" in turn:
        spelled, content, known = turn["from"], turn["value"], _OF_A_TURN | {"from", "value"}
    elif "role" in turn and ("content" in turn or turn.get("tool_calls")):
        spelled, content, known = turn["role"], turn.get("content"), _OF_A_TURN | {"role", "content"}
    else:
        raise RecordError(f'{name} needs "role" and "content", or "from" and "value" (keys found: {keys_of(turn)})')
    if not isinstance(spelled, str) or spelled.lower() not in ROLE_NAMES:
        raise RecordError(f"{name} has the unknown role {str(spelled)[:60]!r}; known: {', '.join(ROLE_NAMES)}")
    role = ROLE_NAMES[spelled.lower()]
    known = known - (set() if role == "tool" else {"name", "tool_call_id"})
    known = known - ({"tool_calls"} if spelled.lower() == "function_call" else set())
    unknown = [key for key in turn if key not in known and turn[key] not in (None, [], {})]
    if unknown:
        raise RecordError(f"{name} has keys that would be lost: {', '.join(map(str, unknown))[:200]}; remove them")
    if spelled.lower() == "function_call":
        calls, content = _calls_in_text(content, name), ""
    else:
        calls = _calls(turn.get("tool_calls"), role, name)
    text = "" if content is None and calls else _content(content, name)
    return Message(
        role, text, _trained(turn, role, name), calls, _label(turn, "name", name), _label(turn, "tool_call_id", name)
    )


def tools_of(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Definitions of tools: a list of objects, or such a list as JSON text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return ()
        tools = _parsed(tools, '"tools"')
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(f'"tools" must be a list of objects, found {kind_of_value(tools)}')
    # As templates expect them: {"type": "function", "function": {"name", "description", "parameters"}}.
    whole = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for number, tool in enumerate(whole, 1):
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise RecordError(f'"tools" entry {number} has no "name"')
    _check_texts(whole, '"tools"')
    return tuple(whole)


def _trained(turn: Mapping[str, Any], role: Role, name: str) -> bool | None:
    if turn.get("weight") is None:
        return None
    weight = turn["weight"]
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise RecordError(f'{name} has "weight" {str(weight)[:60]!r}; known: 0 (not trained), 1 (trained)')
    if weight and role != "assistant":
        raise RecordError(f'{name} has "weight" 1, but only turns of the assistant can be trained')
    return bool(weight)


def _content(content: Any, name: str) -> str:
    if not isinstance(content, list):
        return string(content, f"{name}'s text")
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RecordError(f"{name} has a part that is not text; this version trains text only")
        parts.append(string(part.get("text"), f"{name}'s text"))
    return "".join(parts)


def _label(turn: Mapping[str, Any], key: str, name: str) -> str:
    value = turn.get(key)
    return "" if value is None else string(value, f'{name}\'s "{key}"')


def _calls_in_text(content: Any, name: str) -> tuple[ToolCall, ...]:
    """A call, or a list of them, written as JSON in a turn of the role function_call."""
    value = _parsed(string(content, f"{name}'s text"), f"{name}'s text")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RecordError(f"{name} holds no call")
    return tuple(_call(call, name) for call in calls)


def _calls(value: Any, role: Role, name: str) -> tuple[ToolCall, ...]:
    if value in (None, []):
        return ()
    if role != "assistant":
        raise RecordError(f'{name} has "tool_calls", which only the assistant makes')
    if not isinstance(value, list):
        raise RecordError(f'{name}\'s "tool_calls" must be a list, found {kind_of_value(value)}')
    return tuple(_call(call, name) for call in value)


def _call(call: Any, name: str) -> ToolCall:
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RecordError(f'{name} has a call without "name" and "arguments"')
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"the arguments of {name}'s call") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RecordError(f"the arguments of {name}'s call must be an object, found {kind_of_value(arguments)}")
    _check_texts(arguments, f"the arguments of {name}'s call")
    identity = call.get("id")
    return ToolCall(
        string(inner["name"], f"the name of {name}'s call"),
        arguments,
        "" if identity is None else string(identity, f'the "id" of {name}\'s call'),
    )


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RecordError(f"{name} must be JSON ({reason})") from None


def _check_texts(value: Any, name: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise RecordError(f"{name} hold text that no tokenizer can read, or are nested too deeply") from None
