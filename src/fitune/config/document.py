"""The run file as YAML nodes: every value keeps the line, or the override, that it came from."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fitune.config.allowed import field_options, section_of
from fitune.config.schema import RunConfig
from fitune.errors import InputError

LARGEST_RUN_FILE_BYTES = 1 << 18
_OVERRIDE = "override "
_STEP = re.compile(r"\.?([^.\[\]=\s]+)|\[(\d{1,6})\]")


def origin(node: Node) -> str:
    """Where a value was written: `line 7` or `override train.seed=1`."""
    name = node.start_mark.name
    return name if name.startswith(_OVERRIDE) else f"line {node.start_mark.line + 1}"


def override_path(node: Node) -> str | None:
    """The path that an override named, or None for a value from the file."""
    name = node.start_mark.name
    return name[len(_OVERRIDE) :].split("=", 1)[0] if name.startswith(_OVERRIDE) else None


def _mark(name: str) -> yaml.Mark:
    """The beginning of the text `name`."""
    return yaml.Mark(name, 0, 0, 0, "\0", 0)


def _compose(text: str, name: str) -> Node | None:
    """Raises yaml.YAMLError, or ValueError for text that PyYAML cannot even refuse properly."""
    loader = yaml.SafeLoader(io.StringIO(text))
    loader.name = name
    try:
        return loader.get_single_node()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (OverflowError, IndexError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"malformed ({error})") from None
    finally:
        loader.dispose()


def _explain(error: Exception, text: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        return f"{place}not valid YAML: {said}"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: not valid YAML: the character {chr(int(error.character))!a} is not allowed"
    return f"not valid YAML: {error}"


def read_document(path: Path) -> MappingNode:
    """The run file's top mapping (an empty one for an empty file). Raises InputError."""
    try:
        if path.is_dir():
            raise InputError("is a folder; name the run file in it", where=path)
        with path.open("rb") as file:
            raw = file.read(LARGEST_RUN_FILE_BYTES + 1)
    except FileNotFoundError:
        raise InputError("no such file; `fitune init` writes one to start from", where=path) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=path) from None
    if len(raw) > LARGEST_RUN_FILE_BYTES:
        raise InputError(
            f"larger than {LARGEST_RUN_FILE_BYTES // 1024} KiB; is this a data file? "
            "A run file names the data under data.train",
            where=path,
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"line {line}: not UTF-8 text (byte 0x{raw[error.start]:02x})", where=path) from None
    try:
        root = _compose(text, "file")
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(_explain(error, text), where=path) from None
    if root is None or is_null(root):
        mark = _mark("file")
        return MappingNode("tag:yaml.org,2002:map", [], mark, mark)
    if not isinstance(root, MappingNode):
        raise InputError(
            f"{origin(root)}: must be a mapping of fields such as `model: bundled`, found {described(root)}",
            where=path,
        )
    return root


def is_null(node: Node) -> bool:
    """An empty value, or null."""
    return is_plain(node) and node.value in ("", "~", "null", "Null", "NULL")


def is_plain(node: Node) -> bool:
    """A scalar written without quotes."""
    return isinstance(node, ScalarNode) and getattr(node, "style", None) is None


def described(node: Node) -> str:
    """A value in words, for messages."""
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping"
    if is_null(node):
        return "nothing"
    shown = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
    shown = shown.encode("unicode_escape").decode("ascii") if not shown.isprintable() else shown
    return shown if is_plain(node) and shown.strip() else f'"{shown}"'


def _steps(path: str) -> list[str | int] | None:
    steps: list[str | int] = []
    at = 0
    while at < len(path):
        match = _STEP.match(path, at)
        if match is None or (at == 0) != (match[0][0] not in ".["):
            return None
        steps.append(match[1] if match[1] is not None else int(match[2]))
        at = match.end()
    return steps or None


def _key_index(mapping: MappingNode, name: str) -> int | None:
    for index, (key, _) in enumerate(mapping.value):
        if isinstance(key, ScalarNode) and key.value == name:
            return index
    return None


def _replaced(node: Node | None, steps: Sequence[str | int], value: Node, walked: str) -> Node:
    """A copy of `node` in which the value at `steps` is `value`. Raises ValueError with a sentence."""
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        if not isinstance(node, SequenceNode):
            raise ValueError(f"{walked} is not written as a list in the run file")
        if step >= len(node.value):
            raise ValueError(f"{walked} has {len(node.value)} entries, counted from [0]")
        entries = copy.copy(node)
        entries.value = list(node.value)
        entries.value[step] = _replaced(node.value[step], rest, value, f"{walked}[{step}]")
        return entries
    if node is None or is_null(node):
        node = MappingNode("tag:yaml.org,2002:map", [], value.start_mark, value.end_mark)
    if not isinstance(node, MappingNode):
        raise ValueError(f"{walked} is not written as a mapping in the run file")
    changed = copy.copy(node)
    changed.value = list(node.value)
    index = _key_index(node, step)
    below = f"{walked}.{step}" if walked else step
    if index is None:
        key = ScalarNode("tag:yaml.org,2002:str", step, value.start_mark, value.end_mark)
        changed.value.append((key, _replaced(None, rest, value, below)))
    else:
        key, old = node.value[index]
        changed.value[index] = (key, _replaced(old, rest, value, below))
    return changed


def with_overrides(root: MappingNode, overrides: Sequence[str]) -> tuple[MappingNode, list[str]]:
    """The document with `train.learning_rate=1e-4` and the like applied, and what is wrong with them."""
    problems: list[str] = []
    seen: set[str] = set()
    for override in overrides:
        name = _OVERRIDE + override
        path, equals, text = override.partition("=")
        steps = _steps(path)
        if not equals or steps is None:
            problems.append(f"{name}: must look like train.learning_rate=1e-4")
            continue
        if path in RunConfig.model_fields and section_of(field_options(RunConfig, path)):
            problems.append(f"{name}: names a whole section; override its fields, as {path}.NAME=VALUE")
            continue
        if path in seen:
            problems.append(f"{name}: {path} is given twice")
            continue
        seen.add(path)
        try:
            value = _compose(text, name)
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{name}: {_explain(error, text).removeprefix('line 1: ')}")
            continue
        if value is None:
            mark = _mark(name)
            value = ScalarNode("tag:yaml.org,2002:null", "", mark, mark)
        elif text[value.end_mark.index :].strip():
            problems.append(f"{name}: what follows # would be lost as a comment; put the value in quotes")
            continue
        try:
            root = _replaced(root, steps, value, "")  # type: ignore[assignment]
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return root, problems
