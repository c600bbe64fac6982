"""Schemas as text-to-SQL benchmarks give them (Spider's and BIRD's tables.json), without the databases themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fitune.data.text_to_sql import Column, DatabaseSchema, ForeignKey, Table
from fitune.errors import InputError

_NEEDED = ("db_id", "table_names_original", "column_names_original", "column_types", "primary_keys", "foreign_keys")


def read_schema_file(path: Path) -> dict[str, DatabaseSchema]:
    """A tables.json -> the schema of every database in it, with descriptions where names are also given in words.

    Raises:
        InputError: the file cannot be read, or an entry is not what these benchmarks write; it is named.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", where=path) from None
    if not isinstance(entries, list):
        raise InputError("must be a list of databases' schemas, as Spider's and BIRD's tables.json is", where=path)
    schemas = {}
    for number, entry in enumerate(entries, 1):
        try:
            schemas[str(entry["db_id"])] = _schema(entry)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            missing = [key for key in _NEEDED if not isinstance(entry, dict) or key not in entry]
            why = f"{', '.join(missing)} is missing" if missing else f"it does not fit together ({error})"
            raise InputError(f"entry {number} is no schema of a database: {why}", where=path) from None
    return schemas


def _schema(entry: Mapping[str, Any]) -> DatabaseSchema:
    names: Sequence[str] = entry["table_names_original"]
    words: Sequence[str] = entry.get("table_names") or names
    columns = [(int(table), str(name)) for table, name in entry["column_names_original"]]
    said = [str(name) for _, name in entry.get("column_names") or entry["column_names_original"]]
    types: Sequence[str] = entry["column_types"]
    keys = [[key] if isinstance(key, int) else list(key) for key in entry["primary_keys"]]
    tables = []
    for number, name in enumerate(names):
        own = [place for place, (table, _) in enumerate(columns) if table == number]
        primary = [key for key in keys if columns[key[0]][0] == number]
        foreign = [
            ForeignKey((columns[source][1],), names[columns[target][0]], (columns[target][1],))
            for source, target in entry["foreign_keys"]
            if columns[source][0] == number
        ]
        tables.append(
            Table(
                name,
                tuple(Column(columns[p][1], types[p], True, _description(columns[p][1], said[p])) for p in own),
                tuple(columns[place][1] for key in primary for place in key),
                tuple(foreign),
                description=_description(name, words[number]),
            )
        )
    return DatabaseSchema(tuple(tables))


def _description(name: str, words: str) -> str:
    """Words that say more than the name does; "" where they are the name with spaces."""
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    return "" if "".join(letter for letter in words.lower() if letter.isalnum()) == plain else words
