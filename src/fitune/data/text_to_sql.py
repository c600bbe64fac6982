"""A SQLite database as the context of a text-to-SQL prompt: its schema, written in few tokens.

Databases are only ever opened for reading (`mode=ro`): a missing file is never created.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fitune.data.conversation import Message
from fitune.errors import InputError

LOCK_PATIENCE_SECONDS = 2.0
SQLITE_HEADER = b"SQLite format 3\x00"

INSTRUCTION = "Answer with one SQLite query for this database."

# The keywords that SQLite 3.40 does not take as a bare column or table name; the others need no quotes.
# Found by trying all 147 of them in each position of a query; newer words (FILTER, OVER, ...) stay usable.
RESERVED_WORDS = frozenset(
    """
    ADD ALL ALTER AND AS AUTOINCREMENT BETWEEN CASE CAST CHECK COLLATE COMMIT CONSTRAINT CREATE
    CURRENT_DATE CURRENT_TIME CURRENT_TIMESTAMP DEFAULT DEFERRABLE DELETE DISTINCT DROP ELSE ESCAPE
    EXCEPT EXISTS FOREIGN FROM GROUP HAVING IN INDEX INSERT INTERSECT INTO IS ISNULL JOIN LIMIT NOT
    NOTHING NOTNULL NULL ON OR ORDER PRIMARY RAISE REFERENCES RETURNING SELECT SET TABLE THEN TO
    TRANSACTION UNION UNIQUE UPDATE USING VALUES WHEN WHERE
    """.split()  # noqa: SIM905
)
_BARE_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Column:
    """One column; `declared_type` is the text of the schema, "" where it has none; `description` says it in words."""

    name: str
    declared_type: str = ""
    can_be_null: bool = True
    description: str = ""


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """`columns` of this table refer to `parent_columns` of table `parent`, pairwise."""

    columns: tuple[str, ...]
    parent: str
    parent_columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table or a view; `primary_key` is empty where there is none."""

    name: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()
    is_view: bool = False
    description: str = ""

    def has_column(self, name: str) -> bool:
        return any(column.name == name for column in self.columns)


@dataclass(frozen=True, slots=True)
class DatabaseSchema:
    """Tables first, then views, each in the order of creation.

    `left_out` says in one sentence each what stands in the file but cannot be queried here: a view whose
    definition is broken, a virtual table without its module, a foreign key to a table that is not there.
    """

    tables: tuple[Table, ...]
    left_out: tuple[str, ...] = ()

    def table(self, name: str) -> Table:
        """The table or view called `name`; KeyError if there is none."""
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(name)


def open_read_only(database: Path) -> sqlite3.Connection:
    """Path of a SQLite file -> a connection that cannot write, its header and lock already checked.

    Text that is not UTF-8 is kept, byte for byte, as surrogate escapes. Raises InputError, one sentence, for
    a file that is missing, a folder, empty, not SQLite, damaged, unreadable or locked by another process.
    """
    database = Path(database)
    if not database.exists():
        raise InputError("no such file; give the path of an existing SQLite database", where=database)
    if database.is_dir():
        raise InputError("is a folder; give the path of a SQLite database file", where=database)
    try:
        with database.open("rb") as file:
            header = file.read(len(SQLITE_HEADER))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=database) from error
    if not header:
        raise InputError("is empty (0 bytes); give a SQLite database that has tables", where=database)
    if header != SQLITE_HEADER:
        raise InputError('is not a SQLite database: it does not begin with "SQLite format 3"', where=database)
    connection = None
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(database.resolve()))}?mode=ro", uri=True, timeout=LOCK_PATIENCE_SECONDS
        )
        connection.text_factory = _decode
        connection.execute("PRAGMA query_only = ON")
        connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise InputError(_open_problem(error), where=database) from error
    return connection


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _open_problem(error: sqlite3.Error) -> str:
    message = str(error)
    if "locked" in message or "busy" in message:
        return (
            f"is locked by another program (waited {LOCK_PATIENCE_SECONDS:g} seconds); "
            "close that program, or give a copy of the file"
        )
    if "malformed" in message or "not a database" in message:
        return f"is damaged or not a SQLite database ({message}); restore it from a backup or export it again"
    return f"cannot be opened as a SQLite database ({message})"


def read_schema(database: Path) -> DatabaseSchema:
    """Path of a SQLite file -> its tables and views with columns, primary keys and foreign keys.

    SQLite's own tables (`sqlite_...`) and the shadow tables of virtual tables are not part of a schema.
    Raises InputError as `open_read_only` does, and where the file holds no table at all.
    """
    connection = open_read_only(database)
    try:
        entries = connection.execute(
            "SELECT name, type, sql FROM sqlite_master WHERE type IN ('table', 'view') "
            "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY type = 'view', rowid"
        ).fetchall()
        shadows = _shadow_tables(connection)
        tables: list[Table] = []
        left_out: list[str] = []
        for name, kind, _ in entries:
            if name in shadows:
                continue
            try:
                tables.append(_read_table(connection, name, is_view=kind == "view"))
            except sqlite3.Error as error:
                left_out.append(f"{kind} {name} cannot be queried: {error}")
    except sqlite3.Error as error:
        raise InputError(_open_problem(error), where=database) from error
    finally:
        connection.close()
    if not tables:
        reason = "; ".join(left_out) or "it holds no table"
        raise InputError(f"has nothing to ask about: {reason}", where=database)
    tables = [_resolve_foreign_keys(table, tables, left_out) for table in tables]
    return DatabaseSchema(tuple(tables), tuple(left_out))


def _shadow_tables(connection: sqlite3.Connection) -> set[str]:
    # PRAGMA table_list came with SQLite 3.37; before, shadow tables simply look like tables.
    rows = connection.execute("PRAGMA table_list").fetchall()
    return {row[1] for row in rows if row[2] == "shadow"}


def _read_table(connection: sqlite3.Connection, name: str, is_view: bool) -> Table:
    quoted = quote_always(name)
    connection.execute(f"SELECT * FROM {quoted} LIMIT 0")
    columns: list[Column] = []
    key_positions: list[tuple[int, str]] = []
    for _, column, declared, not_null, _, key_position, hidden in connection.execute(f"PRAGMA table_xinfo({quoted})"):
        if hidden == 1:  # a virtual table's command column, absent from SELECT *
            continue
        columns.append(Column(column, declared or "", not (not_null or key_position)))
        if key_position:
            key_positions.append((key_position, column))
    parts: dict[int, list[tuple[int, str, str, str | None]]] = {}
    for number, position, parent, source, target, *_ in connection.execute(f"PRAGMA foreign_key_list({quoted})"):
        parts.setdefault(number, []).append((position, parent, source, target))
    foreign_keys: list[ForeignKey] = []
    for number in sorted(parts, reverse=True):  # SQLite numbers them from the last declared to the first
        pairs = sorted(parts[number])
        targets = tuple(target for _, _, _, target in pairs if target is not None)
        foreign_keys.append(ForeignKey(tuple(source for _, _, source, _ in pairs), pairs[0][1], targets))
    primary_key = tuple(column for _, column in sorted(key_positions))
    return Table(name, tuple(columns), primary_key, tuple(foreign_keys), is_view)


def _resolve_foreign_keys(table: Table, tables: Sequence[Table], left_out: list[str]) -> Table:
    """Foreign keys in the real spelling of names (SQLite ignores case), implicit targets filled in."""
    resolved: list[ForeignKey] = []
    for key in table.foreign_keys:
        where = f"foreign key {table.name}({', '.join(key.columns)})"
        parent = next((other for other in tables if other.name.lower() == key.parent.lower()), None)
        if parent is None:
            left_out.append(f"{where} refers to {key.parent}, which is not there")
            continue
        columns = tuple(_real_name(table, column) for column in key.columns)
        targets = tuple(_real_name(parent, column) for column in key.parent_columns) or parent.primary_key
        if None in columns or None in targets or len(columns) != len(targets):
            left_out.append(f"{where} refers to columns that {parent.name} lacks")
            continue
        foreign_key = ForeignKey(
            tuple(name for name in columns if name), parent.name, tuple(name for name in targets if name)
        )
        if foreign_key not in resolved:
            resolved.append(foreign_key)
    return Table(table.name, table.columns, table.primary_key, tuple(resolved), table.is_view)


def _real_name(table: Table, column: str) -> str | None:
    return next((c.name for c in table.columns if c.name.lower() == column.lower()), None)


def quote_always(name: str) -> str:
    """Any identifier -> the same in double quotes, inner double quotes doubled."""
    return '"' + name.replace('"', '""') + '"'


def quote_identifier(name: str) -> str:
    """Any identifier -> itself where SQLite takes it bare, else in double quotes."""
    if _BARE_IDENTIFIER.fullmatch(name) and name.upper() not in RESERVED_WORDS:
        return name
    return quote_always(name)


def quote_literal(value: str | int | float) -> str:
    """A value -> its SQL literal; text in single quotes, inner single quotes doubled."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value)


def serialise_schema(schema: DatabaseSchema) -> str:
    """Schema -> `customers(id, name, city); orders(id, customer_id -> customers, ordered)`.

    It stands in every prompt, so it holds what a query needs and nothing else: identifiers spelled as the
    query must spell them (quotes included), and where a foreign key points. A reference to the parent's
    first column when that is its primary key names the table alone; any other names its column
    (`-> countries.code`). Types are left out: they cost about a third more tokens.
    """
    return "; ".join(_serialise_table(table, schema) for table in schema.tables)


def _serialise_table(table: Table, schema: DatabaseSchema) -> str:
    targets: dict[str, str] = {}
    for key in table.foreign_keys:
        parent = schema.table(key.parent)
        for column, target in zip(key.columns, key.parent_columns, strict=True):
            implicit = parent.primary_key == (target,) and parent.columns[0].name == target
            suffix = "" if implicit else f".{quote_identifier(target)}"
            targets.setdefault(column, f" -> {quote_identifier(parent.name)}{suffix}")
    columns = ", ".join(quote_identifier(column.name) + targets.get(column.name, "") for column in table.columns)
    return f"{quote_identifier(table.name)}({columns})"


def sql_messages(schema_text: str, question: str, sql: str | None = None) -> tuple[Message, ...]:
    """Schema text, question and, for training, its query -> the conversation.

    The schema stands in the system message: all prompts of one database share that prefix.
    """
    messages = [
        Message("system", f"{INSTRUCTION}\n{schema_text}"),
        Message("user", question),
    ]
    if sql is not None:
        messages.append(Message("assistant", sql))
    return tuple(messages)
