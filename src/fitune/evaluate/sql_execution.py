"""Execution accuracy: is the answer of a predicted query the answer of the gold query, on this database?

Predictions are text from a model, so they run locked in: the file is opened read-only, an authorizer refuses
everything but reading, one statement only, with a time limit and a limit on the size of any value.
"""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fitune.data.text_to_sql import open_read_only
from fitune.errors import FituneError

RELATIVE_TOLERANCE = 1e-6
STEPS_BETWEEN_CLOCK_LOOKS = 10_000  # SQLite virtual machine instructions: some 0.1 to 1 ms
LARGEST_VALUE_BYTES = 16 * 2**20
MATCHED_ROWS_LIMIT = 500

Outcome = Literal["correct", "wrong", "error", "timeout", "empty"]
Row = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class SqlOutcome:
    """One prediction's fate; `message` says why it is not correct, "" if it is.

    correct: the gold's answer. wrong: another answer. error: SQLite refused the statement.
    timeout: stopped at the time limit. empty: no statement was predicted.
    """

    outcome: Outcome
    message: str = ""

    @property
    def is_correct(self) -> bool:
        return self.outcome == "correct"


@dataclass(frozen=True, slots=True)
class SqlScores:
    """The outcome of every prediction, in order."""

    outcomes: tuple[SqlOutcome, ...]

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, from 0 to 1; not a number where there was none."""
        return self.correct / len(self.outcomes) if self.outcomes else math.nan

    @property
    def correct(self) -> int:
        return self.counts["correct"]

    @property
    def counts(self) -> dict[Outcome, int]:
        """Predictions by outcome, every kind of outcome present."""
        counts: dict[Outcome, int] = {"correct": 0, "wrong": 0, "error": 0, "timeout": 0, "empty": 0}
        for outcome in self.outcomes:
            counts[outcome.outcome] += 1
        return counts


class QueryTimeoutError(Exception):
    """A query ran past its time limit."""


def execution_accuracy(
    predictions: Sequence[str],
    golds: Sequence[str],
    database: Path,
    timeout_seconds: float = 5.0,
) -> SqlScores:
    """Predicted and gold queries, pairwise, and the SQLite file -> an outcome each, and their accuracy.

    Two answers agree when they are the same bag of rows, columns in order; rows in order too where the gold
    has an ORDER BY of its own (not inside a subquery). NULL equals NULL; 1 equals 1.0; numbers agree within
    a relative 1e-6; text is compared exactly. The time limit holds for each query.

    Raises InputError for a database that cannot be read, and FituneError where a gold query fails: that is a
    fault of the data, not a miss of the model.
    """
    if len(predictions) != len(golds):
        raise FituneError(f"{len(predictions)} predictions for {len(golds)} gold queries")
    answers: dict[str, list[Row]] = {}
    outcomes: list[SqlOutcome] = []
    with closing(_confined(database)) as connection:
        for number, (prediction, gold) in enumerate(zip(predictions, golds, strict=True), start=1):
            if gold not in answers:
                answers[gold] = _gold_answer(connection, gold, timeout_seconds, number, database)
            outcomes.append(_judge(connection, prediction, gold, answers[gold], timeout_seconds))
    return SqlScores(tuple(outcomes))


def run_query(database: Path, sql: str, timeout_seconds: float = 5.0, row_limit: int | None = None) -> list[Row]:
    """One query on a SQLite file -> its rows, `row_limit` at most; confined as a prediction is.

    Raises InputError (the database), sqlite3.Error (the query) or QueryTimeoutError.
    """
    with closing(_confined(database)) as connection:
        return _run(connection, sql, timeout_seconds, row_limit)


def run_for_check(database: Path, sql: str) -> None:
    """Runs a query as far as its first row. Raises InputError or sqlite3.Error where that fails, or takes long."""
    try:
        run_query(database, sql, row_limit=1)
    except QueryTimeoutError as error:
        raise sqlite3.OperationalError(f"it takes too long ({error})") from None


def _confined(database: Path) -> sqlite3.Connection:
    connection = open_read_only(database)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE_BYTES)
    connection.set_authorizer(_authorise)
    return connection


_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE})


def _authorise(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action in _READING:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in ("load_extension", "edit"):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _run(connection: sqlite3.Connection, sql: str, timeout_seconds: float, row_limit: int | None) -> list[Row]:
    deadline = time.monotonic() + timeout_seconds
    connection.set_progress_handler(lambda: int(time.monotonic() > deadline), STEPS_BETWEEN_CLOCK_LOOKS)
    cursor = connection.cursor()
    try:
        cursor.execute(sql)
        return cursor.fetchall() if row_limit is None else cursor.fetchmany(row_limit)
    except sqlite3.OperationalError as error:
        if str(error) == "interrupted":
            raise QueryTimeoutError(f"stopped after {timeout_seconds:g} seconds") from error
        raise
    finally:
        cursor.close()
        connection.set_progress_handler(None, 0)


def _gold_answer(
    connection: sqlite3.Connection, gold: str, timeout_seconds: float, number: int, database: Path
) -> list[Row]:
    try:
        return _run(connection, gold, timeout_seconds, row_limit=None)
    except (sqlite3.Error, sqlite3.Warning, ValueError, QueryTimeoutError) as error:
        raise FituneError(f"gold query {number} does not run on {database}: {error}: {gold}") from error


def _judge(
    connection: sqlite3.Connection, prediction: str, gold: str, answer: list[Row], timeout_seconds: float
) -> SqlOutcome:
    if not prediction.strip().strip(";").strip():
        return SqlOutcome("empty", "no query was predicted")
    try:
        # One row more than the gold has already proves the answer wrong: the rest need not be read.
        rows = _run(connection, prediction, timeout_seconds, row_limit=len(answer) + 1)
    except QueryTimeoutError as error:
        return SqlOutcome("timeout", str(error))
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError, OverflowError) as error:
        return SqlOutcome("error", str(error) or type(error).__name__)
    if len(rows) > len(answer):
        return SqlOutcome("wrong", f"more rows than the gold's {len(answer)}")
    if len(rows) < len(answer):
        return SqlOutcome("wrong", f"{len(rows)} rows, the gold has {len(answer)}")
    if rows and len(rows[0]) != len(answer[0]):
        return SqlOutcome("wrong", f"{len(rows[0])} columns, the gold has {len(answer[0])}")
    if same_answer(rows, answer, is_ordered=has_top_level_order(gold)):
        return SqlOutcome("correct")
    return SqlOutcome("wrong", "other values, or another order")


def same_answer(rows: Sequence[Row], answer: Sequence[Row], is_ordered: bool) -> bool:
    """Two answers -> do they agree (see `execution_accuracy`)?"""
    if len(rows) != len(answer):
        return False
    if is_ordered:
        return all(map(_rows_agree, rows, answer))
    surplus = Counter(rows)  # Python hashes 1 and 1.0 alike, as the comparison wants
    surplus.subtract(answer)
    left = [row for row, count in surplus.items() for _ in range(count)]
    right = [row for row, count in surplus.items() for _ in range(-count)]
    if not left:
        return True
    left.sort(key=_sort_key)
    right.sort(key=_sort_key)
    if all(map(_rows_agree, left, right)):
        return True
    # Rounding can change the sorted order of rows with several numbers: look for any complete matching.
    return len(left) <= MATCHED_ROWS_LIMIT and _can_be_matched(left, right)


def _sort_key(row: Row) -> tuple[tuple[int, object], ...]:
    others = tuple((_rank(value), value) for value in row if not isinstance(value, int | float) and value is not None)
    kinds = tuple((_rank(value), 0) for value in row)
    return kinds + others + tuple((1, value) for value in row if isinstance(value, int | float))


def _rank(value: object) -> int:
    return 0 if value is None else 1 if isinstance(value, int | float) else 2 if isinstance(value, str) else 3


def _rows_agree(row: Row, other: Row) -> bool:
    return len(row) == len(other) and all(map(_values_agree, row, other))


def _values_agree(value: object, other: object) -> bool:
    if isinstance(value, float) or isinstance(other, float):
        return (
            isinstance(value, int | float)
            and isinstance(other, int | float)
            and math.isclose(value, other, rel_tol=RELATIVE_TOLERANCE)
        )
    return value == other


def _can_be_matched(left: list[Row], right: list[Row]) -> bool:
    """Is there a pairing of all rows in which each pair agrees (augmenting paths)?"""
    partner: dict[int, int] = {}

    def place(index: int, tried: set[int]) -> bool:
        for candidate, row in enumerate(right):
            if candidate not in tried and _rows_agree(left[index], row):
                tried.add(candidate)
                if candidate not in partner or place(partner[candidate], tried):
                    partner[candidate] = index
                    return True
        return False

    return all(place(index, set()) for index in range(len(left)))


_TOKEN = re.compile(
    r"""(?P<quoted>'(?:[^']|'')*'? | "(?:[^"]|"")*"? | `[^`]*`? | \[[^\]]*\]?)
    | (?P<comment>--[^\n]* | /\*.*?(?:\*/|\Z))
    | (?P<word>\w+)
    | (?P<mark>[();])
    | (?P<space>\s+)""",
    re.VERBOSE | re.DOTALL,
)


def has_top_level_order(sql: str) -> bool:
    """SQL -> has it an ORDER BY outside every bracket, string and comment?"""
    depth = 0
    previous = ""
    for token in _TOKEN.finditer(sql):
        if token["mark"]:
            depth += {"(": 1, ")": -1, ";": 0}[token["mark"]]
        if token["word"]:
            if depth == 0 and previous == "ORDER" and token["word"].upper() == "BY":
                return True
            previous = token["word"].upper()
        elif not token["space"] and not token["comment"]:
            previous = ""
    return False


_FENCE = re.compile(r"```[ \t]*(?P<language>[A-Za-z]*)[^\n]*\n(?P<code>.*?)(?:```|\Z)", re.DOTALL)
_OPENING = r"(?:SELECT\b|WITH\s+(?:RECURSIVE\s+)?[\w\"]+\s*(?:\(|AS\b))"
_STATEMENT_LINE = re.compile(
    rf"^[ \t]*(?:(?:sql|sqlite|sql query|query|answer|assistant)[ \t]*:)?[ \t]*(?={_OPENING})",
    re.IGNORECASE | re.MULTILINE,
)
_STATEMENT_IN_LINE = re.compile(rf"\b{_OPENING}")
_SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>|</s>")
_CLAUSES = frozenset(
    """
    select from where join left right inner cross natural outer full on using group having order limit offset
    union intersect except and or not case when then else end as values window
    """.split()  # noqa: SIM905
)


def extract_sql(generated_text: str) -> str:
    """What a model wrote -> the one query in it, without its semicolon; "" where there is nothing.

    In this order: cut at an end-of-turn marker; take the first fenced code block if there is one; drop what
    stands before the first line that begins with SELECT or WITH (`SQL: SELECT ...` counts), or else before
    the first capital SELECT or WITH; stop at the first semicolon outside quotes, or at a blank line after
    which the text does not go on with a clause of SQL. Nothing is repaired: text without any query is given
    back as it stands, and SQLite will refuse it.
    """
    text = _SPECIAL_TOKEN.split(generated_text.strip())[0]
    fences = list(_FENCE.finditer(text))
    if fences:
        named = [fence for fence in fences if fence["language"].lower() in ("sql", "sqlite")]
        text = (named or fences)[0]["code"]
    start = _STATEMENT_LINE.search(text)
    if start is not None:
        text = text[start.end() :]
    else:
        inside = _STATEMENT_IN_LINE.search(text)
        text = text[inside.start() :] if inside is not None else text
    return text[: _statement_end(text)].strip()


def _statement_end(text: str) -> int:
    for token in _TOKEN.finditer(text):
        if token["mark"] == ";":
            return token.start()
        if token["space"] and token[0].count("\n") > 1:
            following = re.match(r"\w+|.", text[token.end() :])
            if following and following[0].lower() not in _CLAUSES and following[0] not in "(),":
                return token.start()
    return len(text)
