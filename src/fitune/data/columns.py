"""The keys of a file renamed to those of a format: `columns:` in the run file, `--columns` on the command line."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fitune.data.fields import RecordError, keys_of, kind_of_value
from fitune.errors import InputError

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\*)\]")
_START = re.compile(r"[^.\[\]]+")
_ALL = -1  # the place that `[*]` is


def map_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with its keys renamed as `columns` says (found -> wanted).

    A key that is not there by itself may be a path: `answers[0].text`; `[*]` joins a list of texts with spaces. What
    a path takes only a part of stays beside it.

    Raises:
        RecordError: a named key is missing, or its new name is taken.
    """
    if not columns:
        return dict(record)
    paths = {key: _steps(key) for key in columns if key not in record}
    missing = [key for key, steps in paths.items() if not steps or steps[0] not in record]
    if missing:
        raise RecordError(f"{', '.join(map(repr, missing))} of `columns` is missing (keys found: {keys_of(record)})")
    used = columns.keys() | {steps[0] for steps in paths.values() if steps[1:] == [_ALL]}
    used |= {steps[0] for steps in paths.values() if steps[0] in columns.values()}  # gives its name away
    taken = [wanted for wanted in columns.values() if wanted in record and wanted not in used]
    if taken:
        raise RecordError(f"`columns` maps to {', '.join(map(repr, taken))}, which the record already has")
    rest = {key: value for key, value in record.items() if key not in used}
    reached = {
        wanted: _reach(record, paths[found], found) if found in paths else record[found]
        for found, wanted in columns.items()
    }
    return {**reached, **rest}


def check_columns(columns: Mapping[str, str], fields: Collection[str]) -> None:
    """Raises InputError where `columns` maps to none of `fields`, or two keys to one."""
    unknown = sorted({wanted for wanted in columns.values() if wanted not in fields})
    problems = [f"columns: no known field {name!r}; known: {', '.join(fields)}" for name in unknown]
    wanted = list(columns.values())
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    problems += [f"columns: two keys are mapped to {name!r}" for name in twice]
    if problems:
        raise InputError(problems)


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """What stands under a key, or at a path. Raises RecordError where there is nothing."""
    if path in record:
        return record[path]
    steps = _steps(path)
    if not steps or steps[0] not in record:
        raise RecordError(f'"{path}" is missing (keys found: {keys_of(record)})')
    return _reach(record, steps, path)


def _steps(path: str) -> list[str | int]:
    """The keys and places that a path names; empty: it is none."""
    start = _START.match(path)
    if start is None:
        return []
    steps: list[str | int] = [start.group()]
    at = start.end()
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            return []
        key, place = step.groups()
        steps.append(key if key is not None else _ALL if place == "*" else int(place))
        at = step.end()
    return steps if len(steps) > 1 else []


def _reach(value: Any, steps: Sequence[str | int], path: str) -> Any:
    for number, step in enumerate(steps):
        if isinstance(step, str):
            if not isinstance(value, Mapping) or step not in value:
                raise RecordError(f"{path!r}: there is no {step!r} in {kind_of_value(value)}")
            value = value[step]
        elif not isinstance(value, list):
            raise RecordError(f"{path!r}: a list is wanted, found {kind_of_value(value)}")
        elif step == _ALL:
            parts = [_reach(inner, steps[number + 1 :], path) for inner in value]
            wrong = next((part for part in parts if not isinstance(part, str)), None)
            if wrong is not None:
                raise RecordError(f"{path!r}: only texts can be joined, found {kind_of_value(wrong)}")
            return " ".join(part.strip() for part in parts)
        elif step >= len(value):
            raise RecordError(f"{path!r}: the list has {len(value)} entries")
        else:
            value = value[step]
    return value
