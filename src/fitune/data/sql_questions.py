"""Questions with their queries, as Spider and BIRD write them, and the conversations that teach them."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import sqlglot
from sqlglot import exp

from fitune.data.conversation import Origin, Sample
from fitune.data.fields import RecordError, string
from fitune.data.record import Problems
from fitune.data.schema_prompts import Style, Values, cut_schema, sample_values, write_schema
from fitune.data.sources import stream_records
from fitune.data.text_to_sql import DatabaseSchema, read_schema, sql_messages
from fitune.errors import InputError

QUESTION_KEYS = ("question", "SpiderSynQuestion", "SpiderQuestion", "utterance")
SQL_KEYS = ("SQL", "query", "sql")
DATABASE_KEYS = ("db_id", "database", "db")
SUFFIXES = (".sqlite", ".db", ".sqlite3")


@dataclass(frozen=True, slots=True)
class SqlQuestion:
    """A question about a database and the query that answers it.

    Attributes:
        evidence: what BIRD tells beside the question; "" where there is nothing.
    """

    question: str
    sql: str
    database: str
    origin: Origin
    evidence: str = ""
    difficulty: str = ""


@dataclass(slots=True)
class SqlLessons:
    """What came of a file of questions.

    Attributes:
        problems: (place, sentence): queries that do not run, databases that are not there, schemas that do not fit.
        left_out: how many questions made no sample for that.
        cut: how many prompts hold a part of their schema.
        unchecked: how many queries were to be run and were not, as there is a schema of their database and no file.
    """

    samples: list[Sample] = field(default_factory=list)
    problems: list[tuple[Origin, str]] = field(default_factory=list)
    left_out: int = 0
    cut: int = 0
    unchecked: int = 0
    databases: Counter[str] = field(default_factory=Counter)


def read_questions(path: Path) -> list[SqlQuestion]:
    """Every question of a file: {question, query or SQL, db_id}, and evidence and difficulty where they are.

    Raises:
        InputError: the file cannot be read, or records lack something (each is named with its line).
    """
    problems = Problems(str(path))
    found = []
    for record in stream_records(path, problems):
        try:
            if not isinstance(record.value, dict):
                raise RecordError("a question must be an object")
            value = record.value
            question, sql, database = (_first(value, keys) for keys in (QUESTION_KEYS, SQL_KEYS, DATABASE_KEYS))
            found.append(
                SqlQuestion(
                    question, sql, database, Origin(str(path), record.line, problems.unit),
                    str(value.get("evidence") or ""), str(value.get("difficulty") or value.get("hardness") or ""),
                )
            )  # fmt: skip
        except RecordError as error:
            problems.add(record.line, str(error))
    problems.raise_if_any()
    return found


def _first(record: Mapping[str, object], keys: Sequence[str]) -> str:
    for key in keys:
        if isinstance(record.get(key), str) and str(record[key]).strip():
            return string(record[key], f'"{key}"').strip()
    raise RecordError(f"none of {', '.join(keys)} is there as text")


def find_databases(folder: Path) -> dict[str, Path]:
    """The SQLite files under a folder by their names without suffix.

    Raises:
        InputError: there is no such folder, no database in it, or two of one name.
    """
    if not folder.is_dir():
        raise InputError("no such folder; name the one with the SQLite files", where=folder)
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
        if path.stem in found:
            raise InputError(f"two databases are called {path.stem}: {found[path.stem]} and {path}", where=folder)
        found[path.stem] = path
    if not found:
        raise InputError(f"no SQLite file is in it (looked for {', '.join(SUFFIXES)})", where=folder)
    return found


def tables_of(sql: str) -> set[str]:
    """The tables that a query reads, lower-case; of one that cannot be parsed those words of it that could be."""
    try:
        parsed = sqlglot.parse_one(sql, dialect="sqlite")
    except sqlglot.errors.SqlglotError:
        return {word.strip('"`[](),;').lower() for word in sql.split()}
    named = {table.name.lower() for table in parsed.find_all(exp.Table)}
    return named - {cte.alias.lower() for cte in parsed.find_all(exp.CTE)}


def make_lessons(
    questions: Sequence[SqlQuestion], databases: Mapping[str, Path], schemas: Mapping[str, DatabaseSchema],
    run: Callable[[Path, str], object] | None, style: Style = "compact", values: int = 0,
    max_tokens: int | None = None, count: Callable[[str], int] = len,
) -> SqlLessons:  # fmt: skip
    """Questions -> conversations, each with its database's schema as the system message.

    Args:
        databases: name -> SQLite file; schemas: name -> schema, where one is given apart from its database.
        run: runs a query on a database, and raises where it cannot be run; None: nothing is run.
        values: so many values of each column in the prompt.
        max_tokens: the most that a schema may take, counted by `count`; tables are left out by what the question
            speaks of, but never one that the query reads.
    """
    lessons = SqlLessons()
    known: dict[str, tuple[DatabaseSchema, dict[str, dict[str, list[str]]]]] = {}
    for asked in questions:
        try:
            if asked.database not in known:
                known[asked.database] = _schema_of(asked.database, databases, schemas, values)
            schema, examples = known[asked.database]
            is_there = asked.database in databases
            if run is not None and is_there:
                _check(run, databases[asked.database], asked.sql)
            text = write_schema(schema, style, examples)
            if max_tokens is not None and count(text) > max_tokens:
                spoken = f"{asked.question} {asked.evidence}"
                needed = tables_of(asked.sql)
                smaller = cut_schema(schema, spoken, max_tokens, partial(_size, style, examples, count), needed)
                text = write_schema(smaller, style, examples)
                if count(text) > max_tokens:
                    raise RecordError(
                        f"the tables that its query reads take {count(text)} tokens, and {max_tokens} are allowed"
                    )
                lessons.cut += 1
        except (RecordError, InputError) as error:
            lessons.problems.append((asked.origin, str(error)))
            lessons.left_out += 1
            continue
        lessons.databases[asked.database] += 1
        lessons.unchecked += run is not None and not is_there
        question = f"{asked.question}\n{asked.evidence}" if asked.evidence else asked.question
        extra = {"database": asked.database} | ({"difficulty": asked.difficulty} if asked.difficulty else {})
        lessons.samples.append(Sample(sql_messages(text, question, asked.sql), origin=asked.origin, extra=extra))
    return lessons


def _size(style: Style, examples: Values, count: Callable[[str], int], schema: DatabaseSchema) -> int:
    return count(write_schema(schema, style, examples))


def _schema_of(
    name: str, databases: Mapping[str, Path], schemas: Mapping[str, DatabaseSchema], values: int
) -> tuple[DatabaseSchema, dict[str, dict[str, list[str]]]]:
    if name not in databases and name not in schemas:
        raise RecordError(f"there is no database called {name}, nor a schema of it")
    schema = schemas[name] if name in schemas else read_schema(databases[name])
    examples = sample_values(databases[name], schema, values) if values and name in databases else {}
    return schema, examples


def _check(run: Callable[[Path, str], object], database: Path, sql: str) -> None:
    try:
        run(database, sql)
    except sqlite3.Error as error:
        raise RecordError(f"its query does not run: {error}") from None
