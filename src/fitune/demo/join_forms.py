"""The forms of question along foreign keys: a child table refers to a parent, perhaps that one to another.

Queries always begin at the child: `FROM orders JOIN customers ON orders.customer_id = customers.id`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fitune.demo.drafts import Combination, Draft, Draw, Form, column_words, literal, spread
from fitune.demo.forms import any_column, group_limits, is_number
from fitune.demo.profile import ColumnProfile, Edge, Profile
from fitune.demo.wording import with_article

Role = tuple[str, Callable[[ColumnProfile], bool]]  # "child", "parent" or "top", and which of its columns


def _along(upper: bool = False, **roles: Role) -> Callable[[Profile], Iterator[Combination]]:
    """Roles (letter -> whose column, and which) -> every cast over every foreign key (or pair of them)."""

    def combine(profile: Profile) -> Iterator[Combination]:
        for edge in profile.edges:
            if not upper:
                yield from _casts(edge, None, roles)
                continue
            for second in profile.edges:
                if second.child is edge.parent and second.parent is not edge.child:
                    yield from _casts(edge, second, roles)

    return combine


def _casts(edge: Edge, upper: Edge | None, roles: dict[str, Role]) -> Iterator[Combination]:
    tables = {"child": edge.child, "parent": edge.parent}
    if upper is not None:
        tables["top"] = upper.parent

    def cast(letters: list[str], chosen: dict[str, ColumnProfile]) -> Iterator[Combination]:
        if not letters:
            yield Combination(edge.child, **chosen, edge=edge, upper=upper)
            return
        whose, fits = roles[letters[0]]
        table = tables[whose]
        source = table.readable if letters[0] in "cd" else table.columns
        for column in spread([column for column in source if fits(column)], letters[0]):
            if column not in chosen.values():
                yield from cast(letters[1:], {**chosen, letters[0]: column})

    yield from cast(list(roles), {})


def _names_or_repeats(column: ColumnProfile) -> bool:
    return column.is_filter and (column.is_label or column.has_repeats)


def _names_a_row(column: ColumnProfile) -> bool:
    # Counting per customer and showing the city would read as counting per city.
    return column.is_label or column.kind == "key"


def _edge(q: Combination) -> Edge:
    assert q.edge is not None, "a form along a foreign key"
    return q.edge


def _words(q: Combination, **more: object) -> dict[str, str]:
    edge = _edge(q)
    words = {**column_words(q), **{name: str(value) for name, value in more.items()}}
    named = {"child": edge.child, "parent": edge.parent}
    if q.upper is not None:
        named["top"] = q.upper.parent
    plurals = {"child": "children", "parent": "parents", "top": "tops"}
    for name, table in named.items():
        words[name] = table.row_words
        words[plurals[name]] = table.rows_words
        words[f"a_{name}"] = with_article(table.row_words)
    return words


def _sql(column: ColumnProfile | None) -> str:
    assert column is not None, "the form's roles name this column"
    return column.full_sql


def _source(q: Combination) -> str:
    edge = _edge(q)
    upper = f" {q.upper.join}" if q.upper is not None else ""
    return f"FROM {edge.child.sql} {edge.join}{upper}"


def _plain(template: str) -> Callable[[Combination, Draw], Draft]:
    """A query without values: `{source}` the join, `{key}` the parent's joined column, columns by letter."""

    def draft(q: Combination, draw: Draw) -> Draft:
        columns = {letter: column.full_sql for letter in "cdn" if (column := getattr(q, letter)) is not None}
        return Draft(template.format(source=_source(q), key=_edge(q).target.full_sql, **columns), _words(q))

    return draft


def _filtered(selected: str) -> Callable[[Combination, Draw], Draft]:
    def draft(q: Combination, draw: Draw) -> Draft:
        assert q.f is not None, "the form's roles name this column"
        value = draw.value(q.f)
        what = selected.format(c=_sql(q.c) if q.c else "")
        sql = f"SELECT {what} {_source(q)} WHERE {_sql(q.f)} = {literal(value)}"
        return Draft(sql, _words(q, v=value))

    return draft


def _top(q: Combination, draw: Draw) -> Draft:
    rest = f"{_source(q)} GROUP BY {_edge(q).target.full_sql} ORDER BY COUNT(*) DESC LIMIT"
    return Draft(f"SELECT {_sql(q.c)} {rest} 1", _words(q), f"SELECT COUNT(*) {rest} 2")


def _having(q: Combination, draw: Draw) -> Draft:
    edge = _edge(q)
    k = draw.count(f"number of {edge.column.full_sql}", group_limits(edge.column))
    sql = f"SELECT {_sql(q.c)} {_source(q)} GROUP BY {edge.target.full_sql} HAVING COUNT(*) > {k}"
    return Draft(sql, _words(q, k=k))


def _with_child(q: Combination, draw: Draw) -> Draft:
    edge = _edge(q)
    assert q.c is not None, "the form's roles name this column"
    assert q.f is not None, "the form's roles name this column"
    value = draw.value(q.f)
    inner = f"SELECT {edge.column.sql} FROM {edge.child.sql} WHERE {q.f.sql} = {literal(value)}"
    sql = f"SELECT {q.c.sql} FROM {edge.parent.sql} WHERE {edge.target.sql} IN ({inner})"
    return Draft(sql, _words(q, v=value), fewer_than=edge.parent.row_count)


def _without_children(q: Combination, draw: Draw) -> Draft:
    edge = _edge(q)
    assert q.c is not None, "the form's roles name this column"
    inner = f"SELECT {edge.column.sql} FROM {edge.child.sql}"
    sql = f"SELECT {q.c.sql} FROM {edge.parent.sql} WHERE {edge.target.sql} NOT IN ({inner})"
    return Draft(sql, _words(q), fewer_than=edge.parent.row_count)


def _without_null_references(profile: Profile) -> Iterator[Combination]:
    # With a NULL among the references, NOT IN is never true: the query would be a trap, not an answer.
    combinations = _along(c=("parent", any_column))(profile)
    return (q for q in combinations if not _edge(q).column.has_nulls and _edge(q).child.row_count is not None)


_KEY = "a foreign key of one column to another table, both with rows"
_GROUPED = " GROUP BY {key}"

JOIN_FORMS: tuple[Form, ...] = (
    Form(
        "join_columns",
        _KEY,
        False,
        _along(c=("child", any_column), d=("parent", any_column)),
        _plain("SELECT {c}, {d} {source}"),
    ),
    Form(
        "join_filter",
        _KEY + ", and a text column in the parent",
        True,
        _along(c=("child", any_column), f=("parent", _names_or_repeats)),
        _filtered("{c}"),
    ),
    Form(
        "join_count_where",
        _KEY + ", and a text column in the parent",
        True,
        _along(f=("parent", _names_or_repeats)),
        _filtered("COUNT(*)"),
    ),
    Form(
        "join_count",
        _KEY,
        False,
        _along(c=("parent", _names_a_row)),
        _plain("SELECT {c}, COUNT(*) {source}" + _GROUPED),
    ),
    Form(
        "join_total",
        _KEY + ", and a number column in the child",
        False,
        _along(c=("parent", _names_a_row), n=("child", is_number)),
        _plain("SELECT {c}, SUM({n}) {source}" + _GROUPED),
    ),
    Form("join_top", _KEY, False, _along(c=("parent", any_column)), _top),
    Form("join_having", _KEY, True, _along(c=("parent", any_column)), _having),
    Form(
        "two_hop",
        "two foreign keys in a row, and a text column in the last table",
        True,
        _along(upper=True, c=("child", any_column), f=("top", _names_or_repeats)),
        _filtered("{c}"),
    ),
    Form(
        "with_child",
        _KEY + ", and a text column in the child",
        True,
        _along(c=("parent", any_column), f=("child", _names_or_repeats)),
        _with_child,
    ),
    Form(
        "without_children",
        _KEY + ", with a parent that has none",
        False,
        _without_null_references,
        _without_children,
    ),
)
