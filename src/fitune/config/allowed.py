"""What a field of the run file accepts: its possible types as data, and the same in words."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic.fields import FieldInfo

from fitune.config.schema import DataSource, InputFile, OutputFolder, RunConfig, Section


@dataclass(frozen=True)
class Option:
    """One type that a field may have.

    Attributes:
        type: int, float, bool, str, NoneType, Literal, tuple, dict or a Section class.
        marks: bounds and path marks that hold for it.
        items: what is inside: a literal's values, a list's or a pair's entries, a mapping's values.
        is_open: a list of any length (a tuple type with `...`).
    """

    type: Any
    marks: tuple[Any, ...] = ()
    items: tuple[Any, ...] = ()
    is_open: bool = False

    def marked(self, mark: type) -> bool:
        return any(isinstance(found, mark) for found in self.marks)


def _options(annotation: Any, marks: tuple[Any, ...] = ()) -> tuple[Option, ...]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        flat: list[Any] = []
        for mark in extra:
            flat.extend(mark.metadata if isinstance(mark, FieldInfo) else [mark])
        return _options(inner, (*marks, *flat))
    if origin in (Union, types.UnionType):
        return tuple(option for branch in get_args(annotation) for option in _options(branch, marks))
    if origin is Literal:
        return (Option(Literal, marks, get_args(annotation)),)
    if origin is tuple:
        inner = get_args(annotation)
        is_open = inner[-1] is Ellipsis
        entries = tuple(_options(entry) for entry in (inner[:1] if is_open else inner))
        return (Option(tuple, marks, entries, is_open),)
    if origin is dict:
        return (Option(dict, marks, (_options(get_args(annotation)[1]),)),)
    return (Option(annotation, marks),)


@cache
def field_options(section: type[Section], name: str) -> tuple[Option, ...]:
    """The types that field `name` of `section` may have."""
    hint = get_type_hints(section, include_extras=True)[name]
    return _options(hint, tuple(section.model_fields[name].metadata))


def section_of(options: Iterable[Option]) -> type[Section] | None:
    """The section class among the options, if the field is a section."""
    for option in options:
        if isinstance(option.type, type) and issubclass(option.type, Section):
            return option.type
    return None


@cache
def field_paths(section: type[Section] = RunConfig, prefix: str = "") -> tuple[str, ...]:
    """Every field that has a value of its own, as `train.learning_rate`; sections are descended into."""
    paths: list[str] = []
    for name in section.model_fields:
        inner = section_of(field_options(section, name))
        paths.extend(field_paths(inner, f"{prefix}{name}.") if inner else [prefix + name])
    return tuple(paths)


def _bounds(marks: Sequence[Any]) -> str:
    low = high = ""
    for mark in marks:
        match mark:
            case annotated_types.Gt(gt=bound):
                low = f"greater than {bound}"
            case annotated_types.Ge(ge=bound):
                low = f"at least {bound}"
            case annotated_types.Lt(lt=bound):
                high = f"less than {bound}"
            case annotated_types.Le(le=bound):
                high = f"at most {bound}"
    if low.startswith("at least") and high.startswith("at most"):
        return f"from {low.removeprefix('at least ')} to {high.removeprefix('at most ')}"
    return " and ".join(part for part in (low, high) if part)


def _option_in_words(option: Option) -> str:
    if option.type is Literal:
        return f"one of {', '.join(option.items)}" if len(option.items) > 1 else str(option.items[0])
    if option.type is tuple:
        entry = in_words(option.items[0])
        if option.is_open and option.items[0][0].type is Literal:
            return f"a list, each {entry}"
        if option.is_open:
            return f"a list of {'files' if section_of(option.items[0]) else 'names'}"
        return f"a list of {len(option.items)}, each {entry}"
    if option.type in (int, float):
        return f"{'a whole number' if option.type is int else 'a number'} {_bounds(option.marks)}".rstrip()
    if option.type is str:
        if option.marked(InputFile):
            return "a file's path"
        return "a folder's path" if option.marked(OutputFolder) else "text"
    if option.type is dict:
        return f"a mapping of text to {in_words(option.items[0])}"
    if option.type is DataSource:
        return "a file's path or a mapping {" + ", ".join(DataSource.model_fields) + "}"
    return {bool: "true or false", types.NoneType: "empty"}.get(option.type, "a section with fields of its own")


def in_words(options: Sequence[Option]) -> str:
    """`a whole number at least 1 and at most 1024`, `one of cosine, linear, constant`, ..."""
    *first, last = [_option_in_words(option) for option in options]
    return f"{' or '.join(first)}, or {last}" if first else last


def _folded(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` was probably meant to be; case, `-` and `_` do not matter."""
    folded = {_folded(candidate): candidate for candidate in valid}
    close = difflib.get_close_matches(_folded(name), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def suggestion(name: str, section: type[Section], path: str) -> str:
    """What to say about an unknown field `name` of `section`, which lies at `path` ("": the whole file)."""
    if name == "<<":
        return "merge keys are not supported; write the fields out"
    elsewhere = [full for full in field_paths() if full.rsplit(".", 1)[-1] == _folded(name)]
    if elsewhere and _folded(name) not in section.model_fields:
        return f"no such field here; did you mean {' or '.join(elsewhere)}?"
    meant = nearest(name, section.model_fields)
    if meant is None:
        leaves = {full.rsplit(".", 1)[-1]: full for full in field_paths()}
        leaf = nearest(name, leaves)
        meant = None if leaf is None else leaves[leaf]
    if meant is not None:
        return f"no such field; did you mean {meant}?"
    return f"no such field; {path or 'the run file'} has {', '.join(section.model_fields)}"
