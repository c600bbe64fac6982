"""The forms of question about one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from fitune.demo.drafts import (
    Combination,
    Draft,
    Draw,
    Form,
    NoValueError,
    column_words,
    literal,
    row_words,
    spread,
)
from fitune.demo.profile import ColumnProfile, Profile, TableProfile

Roles = Mapping[str, Callable[[ColumnProfile], bool]]

LIMITS = range(2, 13)


def single_table(roles: Roles) -> Callable[[Profile], Iterator[Combination]]:
    """Roles (letter -> which columns can play it) -> all casts with a different column in each role.

    "c" and "d" are returned columns, in either order; a returned column is one that a question can name.
    """

    def combine(profile: Profile) -> Iterator[Combination]:
        for table in profile.tables:
            yield from _casts(table, roles)

    return combine


def _casts(table: TableProfile, roles: Roles) -> Iterator[Combination]:
    def cast(letters: list[str], chosen: dict[str, ColumnProfile]) -> Iterator[Combination]:
        if not letters:
            yield Combination(table, **chosen)  # type: ignore[arg-type]
            return
        letter = letters[0]
        source = table.readable if letter in "cd" else table.columns
        fitting = [column for column in source if roles[letter](column)]
        for column in spread(fitting, letter):
            if column not in chosen.values():
                yield from cast(letters[1:], {**chosen, letter: column})

    yield from cast(list(roles), {})


def any_column(column: ColumnProfile) -> bool:
    return True


def is_filter(column: ColumnProfile) -> bool:
    return column.is_filter


def is_shared_filter(column: ColumnProfile) -> bool:
    """A filter that several rows pass: one that names a single row leaves nothing for a second condition."""
    return column.is_filter and column.has_repeats


def is_grouping(column: ColumnProfile) -> bool:
    return column.is_grouping and not column.has_nulls


def is_number(column: ColumnProfile) -> bool:
    return column.kind == "number" and len(column.values) > 2


def is_number_or_year(column: ColumnProfile) -> bool:
    return column.kind in ("number", "year") and len(column.values) > 2


def is_ordered(column: ColumnProfile) -> bool:
    return column.is_ordered


def is_date(column: ColumnProfile) -> bool:
    return column.kind == "date"


def is_day(column: ColumnProfile) -> bool:
    return column.kind == "date" and not column.has_times


def is_text(column: ColumnProfile) -> bool:
    return column.kind == "text" and bool(column.values)


def has_nulls(column: ColumnProfile) -> bool:
    return column.has_nulls and column.kind not in ("key", "unusable")


def is_repeating(column: ColumnProfile) -> bool:
    return column.has_repeats and not column.has_nulls and column.kind in ("text", "number", "year", "date")


def _words(q: Combination, **more: object) -> dict[str, str]:
    return {**row_words(q.table), **column_words(q), **{name: str(value) for name, value in more.items()}}


def _columns(q: Combination) -> tuple[str, str, str, str, str]:
    """The SQL of a combination's columns c, d, f, g, n ("" where it has none)."""
    c, d, f, g, n = (column.sql if column else "" for column in (q.c, q.d, q.f, q.g, q.n))
    return c, d, f, g, n


def _of(column: ColumnProfile | None) -> ColumnProfile:
    assert column is not None, "the form's roles name this column"
    return column


def _plain(template: str) -> Callable[[Combination, Draw], Draft]:
    """A query without values: `{t}` the table, `{c}` ... `{n}` columns."""

    def draft(q: Combination, draw: Draw) -> Draft:
        c, d, f, g, n = _columns(q)
        return Draft(template.format(t=q.table.sql, c=c, d=d, f=f, g=g, n=n), _words(q))

    return draft


def _valued(template: str, drawn: Sequence[str], filters: bool = False) -> Callable[[Combination, Draw], Draft]:
    """A query with values: `{v}` from the column of the first letter in `drawn`, `{w}` from the second."""

    def draft(q: Combination, draw: Draw) -> Draft:
        c, d, f, g, n = _columns(q)
        if len(drawn) == 2 and drawn[0] == drawn[1]:
            values = draw.values(_of(getattr(q, drawn[0])), 2)
            if q.n is not None:
                values.sort()
        else:
            values = [draw.value(_of(getattr(q, letter))) for letter in drawn]
        names = dict(zip("vw", values, strict=False))
        literals = {name: literal(value) for name, value in names.items()}
        sql = template.format(t=q.table.sql, c=c, d=d, f=f, g=g, n=n, **literals)
        return Draft(sql, _words(q, **names), fewer_than=q.table.row_count if filters else None)

    return draft


def _limited(direction: str) -> Callable[[Combination, Draw], Draft]:
    def draft(q: Combination, draw: Draw) -> Draft:
        c, _, _, _, n = _columns(q)
        k = draw.count("limit", LIMITS)
        sql = f"SELECT {c} FROM {q.table.sql} ORDER BY {n}{direction} LIMIT {k}"
        tie_check = f"SELECT {n} FROM {q.table.sql} ORDER BY {n}{direction} LIMIT {k + 1}"
        return Draft(sql, _words(q, k=k), tie_check)

    return draft


def _extreme(direction: str) -> Callable[[Combination, Draw], Draft]:
    def draft(q: Combination, draw: Draw) -> Draft:
        c, _, _, _, n = _columns(q)
        order = f"FROM {q.table.sql} ORDER BY {n}{direction} LIMIT"
        return Draft(f"SELECT {c} {order} 1", _words(q), f"SELECT {n} {order} 2")

    return draft


def _alike(q: Combination, draw: Draw, role: str, pattern: str, pieces: Iterable[str]) -> Draft:
    c, _, f, _, _ = _columns(q)
    piece = draw.piece(_of(q.f), role, pieces)
    sql = f"SELECT {c} FROM {q.table.sql} WHERE {f} LIKE {literal(pattern.format(piece))}"
    return Draft(sql, _words(q, v=piece), fewer_than=q.table.row_count)


def _starts_with(q: Combination, draw: Draw) -> Draft:
    texts = [str(value) for value in _of(q.f).values]
    starts = [text[:1] for text in texts] + [text.split(" ")[0] for text in texts]
    return _alike(q, draw, "start", "{}%", [start for start in starts if start.isalnum()])


def _contains(q: Combination, draw: Draw) -> Draft:
    pieces = [word for value in _of(q.f).values for word in str(value).split(" ")]
    return _alike(q, draw, "part", "%{}%", [word for word in pieces if word.isalnum() and len(word) > 2])


def _group_having(q: Combination, draw: Draw) -> Draft:
    _, _, f, _, _ = _columns(q)
    k = draw.count(f"size of a group by {_of(q.f).full_sql}", group_limits(_of(q.f)))
    sql = f"SELECT {f} FROM {q.table.sql} GROUP BY {f} HAVING COUNT(*) > {k}"
    return Draft(sql, _words(q, k=k), fewer_than=len(_of(q.f).values))


def group_limits(column: ColumnProfile) -> list[int]:
    """Counts that tell larger groups of the column's values from smaller ones."""
    sizes = column.group_sizes
    if len(sizes) < 2:
        raise NoValueError
    candidates = set(sizes[:-1]) | {size - 1 for size in sizes} | {size // 10 * 10 for size in sizes if size > 20}
    return [k for k in candidates if k >= 1 and sizes[0] <= k < sizes[-1]]


def _most_common(q: Combination, draw: Draw) -> Draft:
    _, _, f, _, _ = _columns(q)
    rest = f"FROM {q.table.sql} GROUP BY {f} ORDER BY COUNT(*) DESC LIMIT"
    return Draft(f"SELECT {f} {rest} 1", _words(q), f"SELECT COUNT(*) {rest} 2")


def _in_year(q: Combination, draw: Draw) -> Draft:
    c, _, _, _, n = _columns(q)
    column = _of(q.n)
    years = {int(str(value)[:4]) for value in column.values}
    year = draw.count(f"year of {column.full_sql}", years)
    sql = f"SELECT {c} FROM {q.table.sql} WHERE strftime('%Y', {n}) = '{year}'"
    return Draft(sql, _words(q, v=year), fewer_than=q.table.row_count)


def _two_different(q: Combination) -> bool:
    return _of(q.f).name < _of(q.g).name  # each pair once


def _either_combinations(profile: Profile) -> Iterator[Combination]:
    return filter(
        _two_different, single_table({"c": any_column, "f": is_shared_filter, "g": is_shared_filter})(profile)
    )


_COUNT = "SELECT COUNT(*) FROM {t}"
_FILTER = {"c": any_column, "f": is_filter}
_MEASURE = {"c": any_column, "n": is_number_or_year}
_ORDER = {"c": any_column, "n": is_ordered}
_ANY = "a table with a column that can be read"
_TEXT = "a table with a text column and another column"
_NUMBER = "a table with a number column (not a key) and another column"
_DATES = "a table with a date column (YYYY-MM-DD) and another column"
_GROUPS = "a table with a column of few values that repeat"
_SORTABLE = "a table with a number or date column without NULLs, and another column"

TABLE_FORMS: tuple[Form, ...] = (
    Form("column", _ANY, False, single_table({"c": any_column}), _plain("SELECT {c} FROM {t}")),
    Form(
        "two_columns",
        "a table with two columns that can be read",
        False,
        single_table({"c": any_column, "d": any_column}),
        _plain("SELECT {c}, {d} FROM {t}"),
    ),
    Form(
        "distinct",
        "a column whose values repeat, without NULLs",
        False,
        single_table({"c": is_repeating}),
        _plain("SELECT DISTINCT {c} FROM {t}"),
    ),
    Form("equals", _TEXT, True, single_table(_FILTER), _valued("SELECT {c} FROM {t} WHERE {f} = {v}", "f")),
    Form(
        "greater",
        _NUMBER,
        True,
        single_table(_MEASURE),
        _valued("SELECT {c} FROM {t} WHERE {n} > {v}", "n", True),
    ),
    Form(
        "less",
        _NUMBER,
        True,
        single_table(_MEASURE),
        _valued("SELECT {c} FROM {t} WHERE {n} < {v}", "n", True),
    ),
    Form(
        "between",
        _NUMBER,
        True,
        single_table(_MEASURE),
        _valued("SELECT {c} FROM {t} WHERE {n} BETWEEN {v} AND {w}", "nn", True),
    ),
    Form("starts_with", _TEXT, True, single_table({"c": any_column, "f": is_text}), _starts_with),
    Form(
        "contains",
        "a text column with values of several words, and another column",
        True,
        single_table({"c": any_column, "f": is_text}),
        _contains,
    ),
    Form(
        "missing",
        "a column with both values and NULLs, and another column",
        False,
        single_table({"c": any_column, "f": has_nulls}),
        _plain("SELECT {c} FROM {t} WHERE {f} IS NULL"),
    ),
    Form(
        "one_of",
        _TEXT,
        True,
        single_table(_FILTER),
        _valued("SELECT {c} FROM {t} WHERE {f} IN ({v}, {w})", "ff"),
    ),
    Form(
        "both",
        "a table with a text column, a number column and another column",
        True,
        single_table({"c": any_column, "f": is_shared_filter, "n": is_number_or_year}),
        _valued("SELECT {c} FROM {t} WHERE {f} = {v} AND {n} > {w}", "fn"),
    ),
    Form(
        "either",
        "a table with two text columns and another column",
        True,
        _either_combinations,
        _valued("SELECT {c} FROM {t} WHERE {f} = {v} OR {g} = {w}", "fg"),
    ),
    Form("sorted_up", _SORTABLE, False, single_table(_ORDER), _plain("SELECT {c} FROM {t} ORDER BY {n}")),
    Form("sorted_down", _SORTABLE, False, single_table(_ORDER), _plain("SELECT {c} FROM {t} ORDER BY {n} DESC")),
    Form("top_n", _SORTABLE, True, single_table(_ORDER), _limited(" DESC")),
    Form("bottom_n", _SORTABLE, True, single_table(_ORDER), _limited("")),
    Form("highest_row", _SORTABLE, False, single_table(_ORDER), _extreme(" DESC")),
    Form("lowest_row", _SORTABLE, False, single_table(_ORDER), _extreme("")),
    Form("count_rows", "a table with rows", False, single_table({}), _plain(_COUNT)),
    Form("count_equals", _TEXT, True, single_table({"f": is_filter}), _valued(_COUNT + " WHERE {f} = {v}", "f")),
    Form(
        "count_greater",
        _NUMBER,
        True,
        single_table({"n": is_number_or_year}),
        _valued(_COUNT + " WHERE {n} > {v}", "n", True),
    ),
    Form(
        "count_distinct",
        "a column whose values repeat, without NULLs",
        False,
        single_table({"c": is_repeating}),
        _plain("SELECT COUNT(DISTINCT {c}) FROM {t}"),
    ),
    Form("total", _NUMBER, False, single_table({"n": is_number}), _plain("SELECT SUM({n}) FROM {t}")),
    Form("average", _NUMBER, False, single_table({"n": is_number}), _plain("SELECT AVG({n}) FROM {t}")),
    Form("largest", _NUMBER, False, single_table({"n": is_number}), _plain("SELECT MAX({n}) FROM {t}")),
    Form("smallest", _NUMBER, False, single_table({"n": is_number}), _plain("SELECT MIN({n}) FROM {t}")),
    Form(
        "average_where",
        "a table with a text and a number column",
        True,
        single_table({"n": is_number, "f": is_shared_filter}),
        _valued("SELECT AVG({n}) FROM {t} WHERE {f} = {v}", "f"),
    ),
    Form(
        "group_count",
        _GROUPS,
        False,
        single_table({"f": is_grouping}),
        _plain("SELECT {f}, COUNT(*) FROM {t} GROUP BY {f}"),
    ),
    Form(
        "group_average",
        _GROUPS + ", and a number column",
        False,
        single_table({"f": is_grouping, "n": is_number}),
        _plain("SELECT {f}, AVG({n}) FROM {t} GROUP BY {f}"),
    ),
    Form("group_having", _GROUPS, True, single_table({"f": is_grouping}), _group_having),
    Form("most_common", _GROUPS, False, single_table({"f": is_grouping}), _most_common),
    Form("in_year", _DATES, True, single_table({"c": any_column, "n": is_date}), _in_year),
    Form(
        "after_date",
        _DATES,
        True,
        single_table({"c": any_column, "n": is_day}),
        _valued("SELECT {c} FROM {t} WHERE {n} > {v}", "n", True),
    ),
    Form(
        "before_date",
        _DATES,
        True,
        single_table({"c": any_column, "n": is_day}),
        _valued("SELECT {c} FROM {t} WHERE {n} < {v}", "n", True),
    ),
    Form(
        "above_average",
        _NUMBER,
        False,
        single_table({"c": any_column, "n": is_number}),
        _plain("SELECT {c} FROM {t} WHERE {n} > (SELECT AVG({n}) FROM {t})"),
    ),
    Form(
        "at_maximum",
        _NUMBER,
        False,
        single_table({"c": any_column, "n": is_number}),
        _plain("SELECT {c} FROM {t} WHERE {n} = (SELECT MAX({n}) FROM {t})"),
    ),
)
