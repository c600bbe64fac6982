"""From a run file and overrides to a `RunConfig`; everything that is wrong is found and told at once."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fitune.config.allowed import Option, field_options, in_words, nearest, section_of, suggestion
from fitune.config.conflicts import CombinationError, Conflict
from fitune.config.document import (
    described,
    is_null,
    is_plain,
    origin,
    override_path,
    read_document,
    with_overrides,
)
from fitune.config.schema import (
    HUB,
    SPLITS,
    STATE,
    DataFile,
    DataSource,
    InputFile,
    InputFolder,
    ModelReference,
    OutputFolder,
    RunConfig,
    Section,
)
from fitune.errors import InputError

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]{0,17})")
_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]{1,4})?")
_BOOL = re.compile(r"(?i:true|yes|on)|(?i:false|no|off)")
_TRUE = ("true", "yes", "on")
_MISSING: Any = object()


class UnfitError(Exception):
    """A value that no option of its field takes; the text says why."""


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads the run file at `path`, with overrides such as `train.learning_rate=1e-4` on top.

    Paths in the file are relative to the file's folder, paths in an override to the current folder; in the
    result they are absolute.

    Raises:
        InputError: all problems together, each with its line or override.
    """
    path = Path(path)
    root, problems = with_overrides(read_document(path), overrides)
    reader = _Reader(path.absolute().parent)
    for problem in problems:
        reader.told.append((True, 0, problem))
    values = reader.section(root, RunConfig, "")
    config = reader.validated(values)
    if config is None:
        raise InputError(reader.problems(), where=path)
    return config.with_accumulation()


class _Reader:
    """Collects problems while values are read; `folder` is the run file's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[tuple[bool, int, str]] = []  # from an override?, line, text
        self.nodes: dict[str, Node] = {}  # of every field that was written
        self.bad: set[str] = set()  # fields whose value could not be taken
        self.lone: set[str] = set()  # lists of which one entry was written, without its list

    def problems(self) -> list[str]:
        return list(dict.fromkeys(text for _, _, text in sorted(self.told, key=lambda entry: entry[:2])))

    def tell(self, node: Node | None, where: str, sentence: str) -> None:
        if node is None:
            self.told.append((False, 0, f"{where}: {sentence}"))
            return
        named = override_path(node)
        place = origin(node) if named == where else f"{origin(node)}: {where}"
        self.told.append((named is not None, node.start_mark.line, f"{place}: {sentence}"))

    # Values, one kind of node after the other.

    def section(self, node: MappingNode, section: type[Section], where: str) -> dict[str, Any]:
        """The readable fields of a section; the others are told."""
        values: dict[str, Any] = {}
        first: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                at = where or "the run file"
                self.tell(key, at, f"a field's name must be a word, found {described(key)}")
                continue
            name = key.value
            full = f"{where}.{name}" if where else name
            if name in first:
                self.tell(key, full, f"given twice (first on {origin(first[name])}); keep one")
                continue
            first[name] = key
            if name not in section.model_fields:
                shown = full if full.isprintable() else ascii(full)
                self.tell(key, shown, suggestion(name, section, where))
                continue
            self.nodes[full] = value
            options = field_options(section, name)
            if is_null(value) and section_of(options) is not None:
                continue  # a section with nothing under it has its defaults
            try:
                values[name] = self.value(value, options, full)
            except UnfitError as unfit:
                self.bad.add(full)
                self.tell(value, full, str(unfit))
        return values

    def value(self, node: Node, options: tuple[Option, ...], where: str) -> Any:
        if isinstance(node, MappingNode):
            return self.mapping(node, options, where)
        if isinstance(node, SequenceNode):
            return self.sequence(node, options, where)
        return self.scalar(node, options, where)

    def mapping(self, node: MappingNode, options: tuple[Option, ...], where: str) -> Any:
        section = section_of(options)
        if section is not None:
            return self.section(node, section, where)
        for option in options:
            if option.type is tuple and section_of(option.items[0]) is not None:
                self.lone.add(where)
                return [self.value(node, option.items[0], where)]
        held = next((option.items[0] for option in options if option.type is dict), None)
        if held is None:
            raise UnfitError(f"must be {in_words(options)}, found a mapping")
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise UnfitError(f"must be {in_words(options)}, found {described(key)} as a key")
            if key.value in mapping:
                raise UnfitError(f"{described(key)} is given twice; keep one")
            self.nodes[f"{where}.{key.value}"] = value
            mapping[key.value] = self.scalar(value, held, where)
        return mapping

    def sequence(self, node: SequenceNode, options: tuple[Option, ...], where: str) -> Any:
        option = next((option for option in options if option.type is tuple), None)
        if option is None:
            raise UnfitError(f"must be {in_words(options)}, found a list")
        if option.is_open and not node.value:
            raise UnfitError(f"must be {in_words(options)}, found an empty list")
        if not option.is_open and len(node.value) != len(option.items):
            raise UnfitError(f"must be {in_words(options)}, found a list of {len(node.value)}")
        entries: list[Any] = []
        for index, entry in enumerate(node.value):
            at = f"{where}[{index}]"
            self.nodes[at] = entry
            try:
                entries.append(self.value(entry, option.items[0 if option.is_open else index], at))
            except UnfitError as unfit:
                self.bad.add(at)
                self.tell(entry, at, str(unfit))
                entries.append(_MISSING)
        return entries

    def scalar(self, node: Node, options: tuple[Option, ...], where: str) -> Any:
        refusal = UnfitError(f"must be {in_words(options)}, found {described(node)}")
        if not isinstance(node, ScalarNode):
            raise refusal
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.endswith((":binary", ":set", ":omap")):
            raise UnfitError(f"the YAML tag {node.tag} is not supported; write the plain value")
        types_ = {option.type: option for option in options}
        if is_null(node):
            if types.NoneType in types_:
                return None
            raise UnfitError(f"has no value; give {in_words(options)}, or leave the field out")
        plain = is_plain(node)
        if plain and bool in types_ and _BOOL.fullmatch(node.value):
            return node.value.lower() in _TRUE
        number = _number(node.value, options) if plain else None
        if number is not None:
            return number
        if Literal in types_ and node.value in types_[Literal].items:
            return node.value
        for option in options:
            if option.type is DataSource or (option.type is tuple and section_of(option.items[0])):
                path = field_options(DataSource, "path")
                one = {"path": self.scalar(node, path, where)}
                return one if option.type is DataSource else [one]
        if str in types_:
            if plain and not node.tag.endswith((":str", ":timestamp", ":merge", ":value")):
                raise UnfitError(f"must be {in_words(options)}, found {described(node)}; as text it takes quotes")
            return self.text(node, types_[str], where)
        if Literal in types_:
            meant = nearest(node.value, types_[Literal].items)
            raise UnfitError(f"{refusal}; did you mean {meant}?" if meant else str(refusal))
        whole = _number(node.value, (Option(float),)) if plain and int in types_ else None
        if whole is not None and float(whole).is_integer() and abs(whole) < 1e15:
            raise UnfitError(f"{refusal}; write {int(whole)}")
        if not plain and _number(node.value, options) is not None:
            raise UnfitError(f"{refusal}; write it without quotes")
        raise refusal

    def text(self, node: ScalarNode, option: Option, where: str) -> str:
        text: str = node.value
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise UnfitError("holds a character that no text file or path can have")
        if not text.strip():
            raise UnfitError("is empty")
        if option.marked(DataFile) and (text.startswith(HUB) or self.is_saved_data(node, text)):
            return text if text.startswith(HUB) else str(self.resolved(node, text))
        if option.marked(InputFile):
            return self.file(node, text, where)
        if option.marked(InputFolder):
            return self.input_folder(node, text, where)
        if option.marked(OutputFolder):
            return str(self.resolved(node, text))
        if option.marked(ModelReference):
            return self.model(node, text, where)
        return text

    # Paths.

    def resolved(self, node: Node, text: str) -> Path:
        """Relative to the run file's folder; to the current folder for an override."""
        folder = Path.cwd() if override_path(node) is not None else self.folder
        try:
            return Path(folder, Path(text).expanduser()).absolute()
        except RuntimeError as error:  # no such user in ~user
            raise UnfitError(f"{text}: {error}") from None

    def is_saved_data(self, node: Node, text: str) -> bool:
        """A folder that the library `datasets` saved; what is in it is looked at when it is read."""
        folder = self.resolved(node, text)
        return any((folder / name).is_file() for name in (STATE, SPLITS))

    def file(self, node: Node, text: str, where: str) -> str:
        path = self.resolved(node, text)
        try:
            if path.is_file():
                with path.open("rb"):
                    return str(path)
            found = "is a folder; name a file in it" if path.is_dir() else f"no such file (looked for {path})"
        except OSError as error:
            found = f"cannot be read: {error.strerror}"
        self.tell(node, where, f"{text}: {found}")
        return str(path)

    def input_folder(self, node: Node, text: str, where: str) -> str:
        path = self.resolved(node, text)
        if not path.is_dir():
            found = "is a file; name the folder it is in" if path.exists() else f"no such folder (looked for {path})"
            self.tell(node, where, f"{text}: {found}")
        return str(path)

    def model(self, node: Node, text: str, where: str) -> str:
        """A model's reference; where it is a path, absolute."""
        path = self.resolved(node, text)
        try:
            exists = text != "bundled" and path.exists()
        except OSError:
            exists = False
        if exists:
            return str(path)
        if text.startswith((".", "/", "~")) or text.lower().endswith(".gguf"):
            self.tell(node, where, f"{text}: no such model (looked for {path})")
        return text

    # Bounds and combinations.

    def validated(self, values: dict[str, Any]) -> RunConfig | None:
        """The config, or None where anything was told. Fields that fail are left out, to see the others."""
        if self.is_bad("data.train") or self.is_bad("data"):
            values["data"] = {**_mapping(values.get("data")), "train": ["placeholder"]}
        while True:
            try:
                config = RunConfig.model_validate(values)
            except ValidationError as error:
                again = [self.fault(fault, values) for fault in error.errors(include_url=False)]
                if any(again):
                    continue
                return None
            return None if self.told else config

    def is_bad(self, *fields: str) -> bool:
        """Whether one of the fields, or something in it, was told already."""
        parts = tuple(start for field in fields for start in (f"{field}.", f"{field}["))
        return any(bad in fields or bad.startswith(parts) for bad in self.bad)

    def fault(self, fault: Any, values: dict[str, Any]) -> bool:
        """Tells one of pydantic's findings; True where it was taken out of `values`, to see the others."""
        reason = fault.get("ctx", {}).get("error")
        if isinstance(reason, CombinationError):
            for conflict in reason.conflicts:
                self.conflict(conflict)
            return False
        names = _field_location(fault["loc"])
        where = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).lstrip(".")
        for alone in self.lone:
            if where.startswith(f"{alone}[0]"):
                where = alone + where.removeprefix(f"{alone}[0]")
        options = _options_at(names)
        held = next((option.items[0] for option in options if option.type is dict), None)
        if held is not None and fault["loc"][-1] != names[-1]:
            where, options = f"{where}.{fault['loc'][-1]}", held
        if self.is_bad(where):
            return _take_out(values, names)
        self.bad.add(where)
        if fault["type"] == "missing":
            self.tell(self.around(where), where, f"is missing; give {in_words(options)}")
        else:
            node = self.nodes.get(where)
            usual = _usual(names)
            found = described(node) if node is not None else repr(fault["input"])
            self.tell(node, where, f"must be {in_words(options)}{usual}, found {found}")
        return _take_out(values, names)

    def around(self, where: str) -> Node | None:
        """What was written nearest around a field that was not."""
        while where:
            where = where[: max(where.rfind("."), where.rfind("["), 0)]
            if where in self.nodes:
                return self.nodes[where]
        return None

    def conflict(self, conflict: Conflict) -> None:
        if self.is_bad(conflict.field, *conflict.beside):
            return  # what stands beside it was misread: this may be no conflict
        written = self.nodes.get(conflict.field)
        self.tell(written, conflict.field, conflict.sentence)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(text: str, options: tuple[Option, ...]) -> int | float | None:
    """The number that a plain scalar means for a field that takes one; 1e-4 is a number here."""
    kinds = {option.type for option in options}
    if int in kinds and _INTEGER.fullmatch(text):
        return int(text)
    if float in kinds and _NUMBER.fullmatch(text):
        number = float(text.replace("_", ""))
        return number if abs(number) != float("inf") else None
    return None


def _field_location(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic's location without the names of types that it puts in for unions."""
    names: list[int | str] = []
    section: type[Section] | None = RunConfig
    for name in location:
        if isinstance(name, int):
            names.append(name)
        elif section is not None and name in section.model_fields:
            names.append(name)
            options = field_options(section, name)
            inner = section_of(options)
            for option in options:
                if option.type is tuple:
                    inner = section_of(option.items[0])
            section = inner
    return tuple(names)


def _section_field(names: tuple[int | str, ...]) -> tuple[type[Section], str] | None:
    """The section class and the field that a location ends in."""
    section: type[Section] = RunConfig
    last: tuple[type[Section], str] | None = None
    for name in names:
        if isinstance(name, int):
            continue
        last = (section, name)
        for option in field_options(section, name):
            entries = option.items[0] if option.type is tuple else (option,)
            section = section_of(entries) or section
    return last


def _options_at(names: tuple[int | str, ...]) -> tuple[Option, ...]:
    field = _section_field(names)
    if field is None:
        return (Option(RunConfig),)
    options = field_options(*field)
    if isinstance(names[-1], int):
        inner = next((option for option in options if option.type is tuple), None)
        if inner is not None:
            options = inner.items[0]
    return options


def _usual(names: tuple[int | str, ...]) -> str:
    field = _section_field(names)
    extra = None if field is None else field[0].model_fields[field[1]].json_schema_extra
    return f" (usually {extra['usual']})" if isinstance(extra, dict) and "usual" in extra else ""


def _take_out(values: dict[str, Any], names: tuple[int | str, ...]) -> bool:
    """Removes what `names` leads to; in a list, the list. A missing data.train gets a placeholder."""
    if names[:1] == ("data",) and (len(names) < 2 or names[1] == "train"):
        data = _mapping(values.get("data"))
        had = data.get("train") == ["placeholder"]
        values["data"] = {**data, "train": ["placeholder"]}
        return not had
    inner: Any = values
    for name in names[:-1]:
        following = inner.get(name) if isinstance(inner, dict) else None
        if not isinstance(following, dict):
            break
        inner = following
    for name in names:
        if isinstance(inner, dict) and name in inner and not isinstance(inner[name], dict):
            del inner[name]
            return True
    return False
