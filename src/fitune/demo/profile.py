"""What a database holds, as far as questions need it: what kind each column is, and some of its values.

Bounded on databases of any size: tables of up to `FULL_READ_ROWS` rows are read, larger ones sampled, and all
queries share one budget of SQLite's virtual machine steps, which unlike seconds is the same on every run.
"""

from __future__ import annotations

import hashlib
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fitune.data.text_to_sql import (
    Column,
    DatabaseSchema,
    Table,
    open_read_only,
    quote_identifier,
    read_schema,
)
from fitune.demo.wording import distinct_words, plural, singular

FULL_READ_ROWS = 5_000
SAMPLED_ROWS = 2_000
LONGEST_VALUE = 40  # characters
STEPS_PER_CALL = 10_000
QUERY_STEPS = 4_000_000  # about 0.1 s
SAMPLE_STEPS = 20_000_000
TOTAL_STEPS = 250_000_000  # about 5 to 10 s

Kind = Literal["key", "number", "year", "date", "text", "unusable"]
Value = str | int | float

_NUMBERING_NAME = re.compile(r"(?:^|_| )(?i:key|code|no|number)$|(?<=[a-z])(?:Key|Code|No|Number)$")
_ID_NAME = re.compile(r"(?:^|_| )(?i:id|uuid|guid)$|(?<=[a-z])(?:ID|Id)$")
_LABEL_NAME = re.compile(r"(?:^|_| )(?:name|title|label)$|(?<=[a-z])(?:Name|Title)$", re.IGNORECASE)
_DAY = re.compile(r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])")
_MOMENT = re.compile(_DAY.pattern + r"[ T]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?")


class StepsExceededError(Exception):
    """A query took more steps than one query may, or than are left for all."""


class StepBudget:
    """Runs queries on one connection, counting SQLite's virtual machine steps."""

    def __init__(self, connection: sqlite3.Connection, total_steps: int = TOTAL_STEPS) -> None:
        self.connection = connection
        self.left = total_steps

    def run(self, sql: str, row_limit: int, steps: int = QUERY_STEPS) -> list[tuple[object, ...]]:
        """SQL -> at most `row_limit` rows. Raises StepsExceededError, or sqlite3.Error as SQLite does."""
        allowed = min(steps, self.left)
        calls = 0

        def count() -> int:
            nonlocal calls
            calls += 1
            return int(calls * STEPS_PER_CALL >= allowed)

        if allowed <= 0:
            raise StepsExceededError
        self.connection.set_progress_handler(count, STEPS_PER_CALL)
        cursor = self.connection.cursor()
        try:
            return cursor.execute(sql).fetchmany(row_limit)
        except sqlite3.OperationalError as error:
            if str(error) == "interrupted":
                raise StepsExceededError from error
            raise
        finally:
            cursor.close()
            self.connection.set_progress_handler(None, 0)
            self.left -= calls * STEPS_PER_CALL


@dataclass(frozen=True)
class ColumnProfile:
    """One column; `values` are distinct, usable in a question, in a shuffled but fixed order."""

    table: str
    name: str
    words: str
    kind: Kind
    values: tuple[Value, ...] = ()
    has_nulls: bool = False
    has_repeats: bool = False
    group_sizes: tuple[int, ...] = ()  # how often its values occur, each size once, ascending
    has_times: bool = False
    is_label: bool = False
    reason: str = ""  # why it is unusable

    @property
    def sql(self) -> str:
        return quote_identifier(self.name)

    @property
    def full_sql(self) -> str:
        return f"{quote_identifier(self.table)}.{self.sql}"

    @property
    def is_filter(self) -> bool:
        """Can it be compared for equality in a natural question: text, or a number of few values?"""
        return bool(self.values) and (self.kind == "text" or (self.kind in ("number", "year") and self.is_grouping))

    @property
    def is_grouping(self) -> bool:
        """Few values that repeat: a question can group by it."""
        return (
            self.kind in ("text", "number", "year")
            and self.has_repeats
            and 2 <= len(self.values) <= (40 if self.kind == "text" else 15)
            and not any(isinstance(value, float) for value in self.values)
            and not self.is_label
        )

    @property
    def is_ordered(self) -> bool:
        """Can rows be ordered by it without a question of where NULLs go?"""
        return self.kind in ("number", "year", "date") and not self.has_nulls and len(self.values) > 2

    def held_out_values(self) -> tuple[Value, ...]:
        """A quarter of the values (rounded up), never the only one: these are never trained."""
        share = -(-len(self.values) // 4) if len(self.values) > 1 else 0
        return self.values[:share]

    def trained_values(self) -> tuple[Value, ...]:
        return self.values[len(self.held_out_values()) :]


@dataclass(frozen=True)
class TableProfile:
    """One table with at least a row; `row_count` is None where it is more than FULL_READ_ROWS."""

    table: Table
    rows_words: str
    row_words: str
    row_count: int | None
    columns: tuple[ColumnProfile, ...]

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def sql(self) -> str:
        return quote_identifier(self.name)

    @property
    def readable(self) -> tuple[ColumnProfile, ...]:
        """Columns that a question can ask for: every usable one, except references to other tables."""
        return tuple(c for c in self.columns if c.kind not in ("key", "unusable") or c.name in self._own_key)

    @property
    def _own_key(self) -> tuple[str, ...]:
        return self.table.primary_key if len(self.table.primary_key) == 1 else ()

    @property
    def label(self) -> ColumnProfile | None:
        """The column by which people call a row: its name or title, or else its own key."""
        named = next((column for column in self.columns if column.is_label), None)
        return named or next((c for c in self.columns if c.name in self._own_key and c.kind != "unusable"), None)

    def column(self, name: str) -> ColumnProfile:
        return next(column for column in self.columns if column.name == name)


@dataclass(frozen=True)
class Edge:
    """A foreign key of one column: `child.column` refers to `parent.target`."""

    child: TableProfile
    column: ColumnProfile
    parent: TableProfile
    target: ColumnProfile

    @property
    def join(self) -> str:
        return f"JOIN {self.parent.sql} ON {self.column.full_sql} = {self.target.full_sql}"


@dataclass(frozen=True)
class Profile:
    """A database as questions see it; `notes` say what had to be left aside, and why."""

    schema: DatabaseSchema
    tables: tuple[TableProfile, ...]
    edges: tuple[Edge, ...]
    notes: tuple[str, ...] = ()


@dataclass
class _Notes:
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)


def read_profile(database: Path, seed: int) -> Profile:
    """Path of a SQLite file, seed (which values are sampled, and their order) -> its profile.

    Raises InputError for a database that cannot be read.
    """
    schema = read_schema(database)
    notes = _Notes(list(schema.left_out))
    words = distinct_words(table.name for table in schema.tables)
    connection = open_read_only(database)
    try:
        budget = StepBudget(connection)
        tables = []
        for table in schema.tables:
            profile = _profile_table(budget, table, words[table.name], seed, notes)
            if profile is not None:
                tables.append(profile)
    finally:
        connection.close()
    return Profile(schema, tuple(tables), _edges(tables, notes), tuple(notes.lines))


def _profile_table(budget: StepBudget, table: Table, words: str, seed: int, notes: _Notes) -> TableProfile | None:
    kind = "view" if table.is_view else "table"
    try:
        rows, is_complete = _sample_rows(budget, table, seed)
    except StepsExceededError:
        notes.add(f"{kind} {table.name}: left aside, reading a sample of it takes too long")
        return None
    except sqlite3.Error as error:
        notes.add(f"{kind} {table.name}: left aside, it cannot be read: {error}")
        return None
    if not rows:
        notes.add(f"{kind} {table.name}: left aside, it is empty")
        return None
    column_words = distinct_words(column.name for column in table.columns)
    columns = []
    for position, column in enumerate(table.columns):
        values = [row[position] for row in rows]
        profile = _profile_column(table, column, column_words[column.name], values, seed)
        if profile.kind == "unusable":
            notes.add(f"column {table.name}.{column.name}: left aside, {profile.reason}")
        columns.append(profile)
    return TableProfile(
        table, plural(words), singular(words), len(rows) if is_complete else None, _mark_label(columns)
    )


def _sample_rows(budget: StepBudget, table: Table, seed: int) -> tuple[list[tuple[object, ...]], bool]:
    """Rows of a table, its blobs and long texts cut short, and whether these are all of its rows."""
    name = quote_identifier(table.name)
    longest = 2 * LONGEST_VALUE
    selected = ", ".join(
        f"CASE typeof({c}) WHEN 'blob' THEN x'' WHEN 'text' THEN substr({c}, 1, {longest}) ELSE {c} END"
        for c in (quote_identifier(column.name) for column in table.columns)
    )
    rows = budget.run(f"SELECT {selected} FROM {name} LIMIT {FULL_READ_ROWS + 1}", FULL_READ_ROWS + 1, SAMPLE_STEPS)
    if len(rows) <= FULL_READ_ROWS:
        return rows, True
    try:
        last = budget.run(f"SELECT max(rowid) FROM {name}", 1)[0][0]
        if isinstance(last, int):
            rng = random.Random(f"rows of {table.name} {seed}")
            places = ", ".join(str(rng.randint(1, last)) for _ in range(SAMPLED_ROWS))
            scattered = budget.run(f"SELECT {selected} FROM {name} WHERE rowid IN ({places})", SAMPLED_ROWS)
            rows = rows[: SAMPLED_ROWS // 2] + scattered
    except (sqlite3.Error, StepsExceededError):
        pass  # a view or a table WITHOUT ROWID: its first rows are the sample
    return rows, False


def _profile_column(table: Table, column: Column, words: str, values: Sequence[object], seed: int) -> ColumnProfile:
    present = [value for value in values if value is not None]
    has_nulls = len(present) < len(values)
    references = {name for key in table.foreign_keys for name in key.columns}

    def unusable(reason: str) -> ColumnProfile:
        return ColumnProfile(table.name, column.name, words, "unusable", has_nulls=has_nulls, reason=reason)

    if not present:
        return unusable("it holds only NULL")
    if any(isinstance(value, bytes) for value in present):
        return unusable("it holds BLOBs")
    is_text = all(isinstance(value, str) for value in present)
    if not is_text and any(isinstance(value, str) for value in present):
        return unusable("it mixes numbers and text")
    distinct = set(present)
    candidates = {normal for value in distinct if (normal := _usable(value)) is not None}
    readings = Counter(str(value).lower() for value in candidates)
    usable = sorted(
        # Values that differ only in case would be one value in half of all questions.
        (value for value in candidates if readings[str(value).lower()] == 1),
        key=lambda value: _shuffle_key(seed, table.name, column.name, value),
    )
    kind: Kind
    has_times = False
    if column.name in references or (not is_text and _is_key(table, column, present, len(distinct))):
        kind = "key"
    elif is_text and all(_DAY.fullmatch(str(value)) for value in present):
        kind = "date"
    elif is_text and all(_DAY.fullmatch(str(value)) or _MOMENT.fullmatch(str(value)) for value in present):
        kind, has_times = "date", True
    elif is_text and _ID_NAME.search(column.name):
        kind = "key"
    elif is_text:
        kind = "text"
    elif words.split()[-1] in ("year", "yr") and all(isinstance(v, int) and 1000 <= v <= 2200 for v in present):
        kind = "year"
    else:
        kind = "number"
    return ColumnProfile(
        table=table.name,
        name=column.name,
        words=words,
        kind=kind,
        values=tuple(usable),
        has_nulls=has_nulls,
        has_repeats=len(distinct) < len(present),
        group_sizes=tuple(sorted(set(Counter(present).values()))),
        has_times=has_times,
    )


def _is_key(table: Table, column: Column, present: Sequence[object], distinct: int) -> bool:
    """A number that names rows instead of measuring them."""
    if column.name in table.primary_key or _ID_NAME.search(column.name):
        return True
    return bool(_NUMBERING_NAME.search(column.name)) and distinct == len(present) > 2


def _usable(value: object) -> Value | None:
    """A value as a question can quote it, or None."""
    if isinstance(value, str):
        is_plain = value.isprintable() and value == value.strip() and '"' not in value and "  " not in value
        return value if is_plain and 0 < len(value) <= LONGEST_VALUE and value[-1] not in ".,;:!?" else None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e12:
        return int(value)
    if (
        isinstance(value, int | float)
        and len(repr(value)) <= 12
        and "e" not in repr(value)
        and "n" not in repr(value)
    ):
        return value
    return None


def _shuffle_key(seed: int, *parts: object) -> bytes:
    return hashlib.sha256(repr((seed, *parts)).encode("utf-8", "surrogatepass")).digest()


def _mark_label(columns: Sequence[ColumnProfile]) -> tuple[ColumnProfile, ...]:
    texts = [column for column in columns if column.kind == "text"]
    label = next((c for c in texts if _LABEL_NAME.search(c.name)), None)
    label = label or next((c for c in texts if not c.has_repeats and not c.has_nulls), None)
    return tuple(
        ColumnProfile(**{**vars(column), "is_label": True}) if column is label else column for column in columns
    )


def _edges(tables: Sequence[TableProfile], notes: _Notes) -> tuple[Edge, ...]:
    """Foreign keys that a question can follow: one column, to another table, the only one between both."""
    by_name = {table.name: table for table in tables}
    edges: list[Edge] = []
    for child in tables:
        keys = [key for key in child.table.foreign_keys if key.parent in by_name]
        for key in keys:
            where = f"foreign key {child.name}({', '.join(key.columns)})"
            if len(key.columns) > 1:
                notes.add(f"{where}: no joins, it has several columns")
            elif key.parent == child.name:
                notes.add(f"{where}: no joins, it refers to its own table")
            elif sum(other.parent == key.parent for other in keys) > 1:
                notes.add(f"{where}: no joins, a question could not tell it from another one to {key.parent}")
            else:
                parent = by_name[key.parent]
                column, target = child.column(key.columns[0]), parent.column(key.parent_columns[0])
                edges.append(Edge(child, column, parent, target))
    return tuple(edges)
