"""The run file that `fitune init` writes: every field with its meaning, taken from the schema."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from fitune.config.allowed import field_options, in_words, section_of
from fitune.config.schema import DataSettings, DataSource, RunConfig, Section

_HEAD = """\
# A run of fitune. Lines that begin with #name: show a field's default (or an example, where the default is
# to leave it out); take the # away to change one. Paths are relative to this file's folder.
# Check it with `fitune plan {name}`, run it with `fitune train {name}`; override a field for one run with
# e.g. `fitune train {name} train.learning_rate=1e-4`.
"""


def _yaml(value: Any) -> str:
    """A value on one line, quoted where it must be."""
    entry = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump([entry], default_flow_style=True, allow_unicode=True, width=100_000).strip()[1:-1]


def _field(section: type[Section], name: str, indent: str, chosen: Any = PydanticUndefined) -> list[str]:
    field = section.model_fields[name]
    meaning = f"{field.description}. Allowed: {in_words(field_options(section, name))}."
    lines = textwrap.wrap(meaning, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    if chosen is not PydanticUndefined:
        return [*lines, f"{indent}{name}: {_yaml(chosen)}"]
    default = field.get_default(call_default_factory=True, validated_data={})
    if default not in (None, {}):
        return [*lines, f"{indent}#{name}: {_yaml(default)}"]
    return [*lines, f"{indent}#{name}: {_yaml((field.examples or [None])[0])}  # (an example)"]


def starter_file(
    model: str = "bundled", data: str = "train.jsonl", method: str = "qlora", name: str = "run.yaml",
    settings: Mapping[str, Any] | None = None, origin: str | None = None,
) -> str:  # fmt: skip
    """A commented run file that trains `model` on the file `data`; `name` is what it will be called.

    `settings` are filled in ({"lora.rank": 64}); `origin` says in the file's head where they come from.
    """
    given = dict(settings or {})
    chosen = {"model": model, "method": method, **given}
    lines = [_HEAD.format(name=name) + (f"# The settings that are filled in: {origin}\n" if origin else "")]
    sections: list[tuple[str, type[Section]]] = []
    for field in RunConfig.model_fields:
        inner = section_of(field_options(RunConfig, field))
        if inner is not None:
            sections.append((field, inner))
        else:
            lines += _field(RunConfig, field, "", chosen.get(field, PydanticUndefined))
    for title, section in sections:
        lines += ["", f"# {RunConfig.model_fields[title].description}.", f"{title}:"]
        for field in section.model_fields:
            if section is DataSettings and field == "train":
                lines += _train(data)
            else:
                lines += _field(section, field, "  ", given.get(f"{title}.{field}", PydanticUndefined))
    return "\n".join(lines) + "\n"


def _train(data: str) -> list[str]:
    lines = [f"  # {DataSettings.model_fields['train'].description}.", "  train:"]
    indent = " " * 6
    for name in DataSource.model_fields:
        fields = _field(DataSource, name, indent, data if name == "path" else PydanticUndefined)
        if name == "path":
            fields[-1] = f"    - {fields[-1].removeprefix(indent)}"
        lines += fields
    return lines
