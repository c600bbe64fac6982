"""A schema as a prompt has it: in few tokens, as SQL, or as a list that says everything; and cut to a budget."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fitune.data.text_to_sql import (
    DatabaseSchema,
    ForeignKey,
    Table,
    open_read_only,
    quote_always,
    quote_identifier,
    quote_literal,
    serialise_schema,
)

Style = Literal["compact", "create", "list"]
STYLES: tuple[Style, ...] = ("compact", "create", "list")
# Table -> column -> some of its values.
Values = Mapping[str, Mapping[str, list[str]]]
SHOWN_VALUE = 40
_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+")
# Words of questions that say nothing about tables.
_EMPTY_WORDS = frozenset(
    """
    a an the of in on at to for from by with and or not is are was were be what which who whom whose when where how
    many much all each every any do does did have has had that this these those it its their there show list find give
    return tell me please name names id number total than more less most least
    """.split()  # noqa: SIM905
)


def write_schema(schema: DatabaseSchema, style: Style = "compact", values: Values | None = None) -> str:
    """The schema as text.

    "compact": names and where foreign keys point, nothing else. "create": CREATE TABLE statements. "list": a line for
    each column with its type, keys and description. `values` (examples) stand in "create" and "list".
    """
    if style == "compact":
        return serialise_schema(schema)
    write = _as_create if style == "create" else _as_list
    return "\n\n".join(write(table, (values or {}).get(table.name, {})) for table in schema.tables)


def sample_values(database: Path, schema: DatabaseSchema, count: int) -> dict[str, dict[str, list[str]]]:
    """Up to `count` different values of every column; texts in quotes, long ones shortened.

    Raises InputError where the database cannot be read.
    """
    found: dict[str, dict[str, list[str]]] = {}
    with closing(open_read_only(database)) as connection:
        for table in schema.tables:
            found[table.name] = {}
            for column in table.columns:
                name = quote_always(column.name)
                try:
                    rows = connection.execute(
                        f"SELECT DISTINCT {name} FROM {quote_always(table.name)} "
                        f"WHERE {name} IS NOT NULL AND typeof({name}) != 'blob' LIMIT {int(count)}"
                    ).fetchall()
                except sqlite3.Error:  # a schema from elsewhere may name what is not there
                    continue
                found[table.name][column.name] = [_shown(value) for (value,) in rows]
    return found


def cut_schema(
    schema: DatabaseSchema, question: str, tokens: int, count: Callable[[DatabaseSchema], int],
    needed: Collection[str] = (),
) -> DatabaseSchema:  # fmt: skip
    """As many tables as `tokens` hold, those first whose names the question speaks of; foreign keys to others go.

    Args:
        count: how many tokens a schema takes.
        needed: names of tables that stay in any case: what the answer's query reads.

    A schema of the needed tables alone may take more than `tokens`; whoever asks must look.
    """
    if count(schema) <= tokens:
        return schema
    asked = words_of(question)
    lower = {name.lower() for name in needed}
    scores = [_relevance(table, asked) for table in schema.tables]
    is_needed = [table.name.lower() in lower for table in schema.tables]
    ranked = sorted(range(len(schema.tables)), key=lambda n: (not is_needed[n], -scores[n], n))
    chosen: set[int] = set()
    for place in ranked:
        tried = chosen | {place}
        if is_needed[place] or count(_only(schema, tried)) <= tokens:
            chosen = tried
    return _only(schema, chosen or {ranked[0]})


def words_of(text: str) -> set[str]:
    """The words of a text or an identifier, lower-case, without endings and without those that say nothing."""
    words = {part.lower() for part in _PART.findall(text)}
    return {_stem(word) for word in words if word not in _EMPTY_WORDS and (len(word) > 1 or not word.isascii())}


def _stem(word: str) -> str:
    for ending in ("ies", "es", "s"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word


def _relevance(table: Table, asked: set[str]) -> int:
    """A table's own name says more than one of its columns."""
    columns = set().union(*(words_of(f"{column.name} {column.description}") for column in table.columns))
    return 3 * len(words_of(f"{table.name} {table.description}") & asked) + len(columns & asked)


def _only(schema: DatabaseSchema, places: Collection[int]) -> DatabaseSchema:
    kept = [table for place, table in enumerate(schema.tables) if place in places]
    names = {table.name for table in kept}
    tables = tuple(
        replace(table, foreign_keys=tuple(key for key in table.foreign_keys if key.parent in names)) for table in kept
    )
    return DatabaseSchema(tables, schema.left_out)


def _as_create(table: Table, values: Mapping[str, list[str]]) -> str:
    parts = []
    for column in table.columns:
        declared = f" {column.declared_type}" if column.declared_type else ""
        examples = values.get(column.name)
        said = [column.description] if column.description else []
        said += [f"e.g. {', '.join(examples)}"] if examples else []
        parts.append((f"{quote_identifier(column.name)}{declared}", "; ".join(said)))
    if table.primary_key:
        parts.append((f"PRIMARY KEY ({_names(table.primary_key)})", ""))
    for key in table.foreign_keys:
        parts.append((f"FOREIGN KEY ({_names(key.columns)}) REFERENCES {_target(key)}", ""))
    lines = [
        f"  {text}{',' if place + 1 < len(parts) else ''}{f' -- {said}' if said else ''}"
        for place, (text, said) in enumerate(parts)
    ]
    return "\n".join([f"CREATE TABLE {quote_identifier(table.name)} (", *lines, ");"])


def _as_list(table: Table, values: Mapping[str, list[str]]) -> str:
    heading = f"{quote_identifier(table.name)}{f' ({table.description})' if table.description else ''}:"
    lines = []
    for column in table.columns:
        targets = [
            f"-> {quote_identifier(key.parent)}.{quote_identifier(target)}"
            for key in table.foreign_keys
            for source, target in zip(key.columns, key.parent_columns, strict=True)
            if source == column.name
        ]
        examples = values.get(column.name)
        said = [
            *([column.declared_type] if column.declared_type else []),
            *(["primary key"] if column.name in table.primary_key else []),
            *targets,
            *([column.description] if column.description else []),
            *([f"e.g. {', '.join(examples)}"] if examples else []),
        ]
        lines.append(f"- {quote_identifier(column.name)}" + (f": {'; '.join(said)}" if said else ""))
    return "\n".join([heading, *lines])


def _names(columns: Collection[str]) -> str:
    return ", ".join(map(quote_identifier, columns))


def _target(key: ForeignKey) -> str:
    return f"{quote_identifier(key.parent)} ({_names(key.parent_columns)})"


def _shown(value: str | int | float) -> str:
    if isinstance(value, str) and len(value) > SHOWN_VALUE:
        value = value[: SHOWN_VALUE - 3] + "..."
    literal = quote_literal(value)
    return " ".join(literal.encode("utf-8", "replace").decode().split())
