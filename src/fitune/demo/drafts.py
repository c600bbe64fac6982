"""One question before it is worded: its query, the words for the placeholders, and the values it draws.

Every value comes from one side of a fixed split of each column's values: trained, or held out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fitune.data.text_to_sql import quote_literal
from fitune.demo.profile import ColumnProfile, Edge, Profile, TableProfile, Value
from fitune.demo.wording import plural, with_article

HELD_OUT_EVERY = 4  # one count (of a LIMIT, of a group's size) or one word in four is held out
COLUMNS_PER_ROLE = 8


class NoValueError(Exception):
    """This side of the split has no value that the form could use."""


@dataclass
class Draw:
    """Values from one side of the split; `slots` remembers (which column or count, value) for the checks."""

    rng: random.Random
    seed: int
    is_held_out: bool
    slots: list[tuple[str, str]] = field(default_factory=list)

    def values(self, column: ColumnProfile, count: int) -> list[Value]:
        """`count` different values of the column."""
        pool = column.held_out_values() if self.is_held_out else column.trained_values()
        if len(pool) < count:
            raise NoValueError
        chosen = self.rng.sample(pool, count)
        self.slots += [(f"{column.table}.{column.name}", str(value)) for value in chosen]
        return chosen

    def value(self, column: ColumnProfile) -> Value:
        return self.values(column, 1)[0]

    def count(self, slot: str, candidates: Iterable[int]) -> int:
        """A number that stands for itself, such as the n of a LIMIT."""
        mine = sorted({k for k in candidates if ((k + self.seed) % HELD_OUT_EVERY == 3) == self.is_held_out})
        if not mine:
            raise NoValueError
        chosen = self.rng.choice(mine)
        self.slots.append((slot, str(chosen)))
        return chosen

    def piece(self, column: ColumnProfile, role: str, pieces: Iterable[str]) -> str:
        """A part of the column's text values; never one that is itself a whole value of the column."""
        whole = {str(value).lower() for value in column.values}
        mine = sorted({p for p in pieces if p.lower() not in whole and self._is_mine(column, role, p)})
        if not mine:
            raise NoValueError
        chosen = self.rng.choice(mine)
        self.slots.append((f"{column.table}.{column.name} {role}", chosen))
        return chosen

    def _is_mine(self, column: ColumnProfile, role: str, piece: str) -> bool:
        text = repr((self.seed, column.table, column.name, role, piece.lower()))
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        return (digest[0] % HELD_OUT_EVERY == 0) == self.is_held_out


@dataclass(frozen=True)
class Combination:
    """The tables and columns that one question is about; the letters are the placeholders' (phrasings.py)."""

    table: TableProfile
    c: ColumnProfile | None = None
    d: ColumnProfile | None = None
    f: ColumnProfile | None = None
    g: ColumnProfile | None = None
    n: ColumnProfile | None = None
    edge: Edge | None = None
    upper: Edge | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from every other combination of the same form."""
        columns = (self.c, self.d, self.f, self.g, self.n)
        names = [f"{column.table}.{column.name}" if column else "" for column in columns]
        edges = [f"{e.child.name}.{e.column.name}" if e else "" for e in (self.edge, self.upper)]
        return (self.table.name, *names, *edges)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables its query reads."""
        names = [self.table.name]
        for edge in (self.edge, self.upper):
            if edge is not None:
                names += [edge.child.name, edge.parent.name]
        return tuple(dict.fromkeys(names))

    @property
    def returns_label(self) -> bool:
        return self.c is not None and self.c.is_label


@dataclass(frozen=True)
class Draft:
    """A query with the words its wording needs.

    tie_check: a query whose last two rows must differ in their first column, or the gold would hang on how
    SQLite breaks a tie. fewer_than: the gold must return fewer rows (or, for a count, a smaller number): a
    filter that filters nothing tests nothing.
    """

    sql: str
    words: dict[str, str]
    tie_check: str | None = None
    fewer_than: int | None = None


@dataclass(frozen=True)
class Form:
    """One form of question: what it can be about, and how a query is drafted.

    needs: what a database must have for it, in words. draws_values: whether its queries hold values; where
    they do not, some combinations are held out instead of some values.
    """

    name: str
    needs: str
    draws_values: bool
    combinations: Callable[[Profile], Iterable[Combination]]
    draft: Callable[[Combination, Draw], Draft]


def literal(value: Value) -> str:
    return quote_literal(value)


def row_words(table: TableProfile) -> dict[str, str]:
    """Placeholders for the rows of one table."""
    return {"rows": table.rows_words, "row": table.row_words, "a_row": with_article(table.row_words)}


def column_words(combination: Combination) -> dict[str, str]:
    """Placeholders for the columns of a combination."""
    words: dict[str, str] = {}
    for letter in "cdfgn":
        column = getattr(combination, letter)
        if column is not None:
            words[letter] = column.words
            words[f"{letter}s"] = plural(column.words)
            words[f"a_{letter}"] = with_article(column.words)
    if combination.n is not None:
        is_date = combination.n.kind in ("date", "year")
        words["high"], words["low"] = ("latest", "earliest") if is_date else ("highest", "lowest")
    return words


def spread(columns: Sequence[ColumnProfile], role: str) -> list[ColumnProfile]:
    """At most COLUMNS_PER_ROLE of the columns, label first; another choice for another role."""

    def place(column: ColumnProfile) -> tuple[bool, bytes]:
        return not column.is_label, hashlib.sha256(f"{role} {column.name}".encode("utf-8", "replace")).digest()

    return list(columns) if len(columns) <= COLUMNS_PER_ROLE else sorted(columns, key=place)[:COLUMNS_PER_ROLE]
