from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fitune.data.text_to_sql import (
    RESERVED_WORDS,
    open_read_only,
    quote_identifier,
    quote_literal,
    read_schema,
    serialise_schema,
    sql_messages,
)
from fitune.errors import InputError


def build(path: Path, script: str) -> Path:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    return path


def test_schema_in_few_words(tmp_path: Path) -> None:
    database = build(
        tmp_path / "a.sqlite",
        """
        CREATE TABLE country (code TEXT, name TEXT, PRIMARY KEY (code));
        CREATE TABLE Person (name TEXT, id INTEGER PRIMARY KEY, land TEXT REFERENCES COUNTRY (CODE),
                             boss REFERENCES person);
        CREATE TABLE "order" (id INTEGER PRIMARY KEY, "unit price" REAL, "a""b" TEXT, größe TEXT,
                              total REAL AS ("unit price" * 2), gone INTEGER REFERENCES nowhere (id));
        CREATE VIEW cheap AS SELECT id FROM "order";
        CREATE VIEW broken AS SELECT x FROM missing;
        """,
    )
    schema = read_schema(database)
    assert serialise_schema(schema) == (
        "country(code, name); Person(name, id, land -> country, boss -> Person.id); "
        '"order"(id, "unit price", "a""b", "größe", total, gone); cheap(id)'
    )
    assert schema.table("cheap").is_view
    assert schema.table("country").primary_key == ("code",)
    assert len(schema.left_out) == 2
    assert "broken" in schema.left_out[0]
    assert "nowhere" in schema.left_out[1]


def test_composite_keys_and_full_text_tables(tmp_path: Path) -> None:
    database = build(
        tmp_path / "a.sqlite",
        """
        CREATE TABLE room (building TEXT, number INTEGER, PRIMARY KEY (building, number));
        CREATE TABLE lesson (title TEXT, building TEXT, number INTEGER,
                             FOREIGN KEY (building, number) REFERENCES room);
        CREATE VIRTUAL TABLE notes USING fts5 (body);
        """,
    )
    schema = read_schema(database)
    assert [table.name for table in schema.tables] == ["room", "lesson", "notes"]
    assert [column.name for column in schema.table("notes").columns] == ["body"]
    assert serialise_schema(schema) == (
        "room(building, number); lesson(title, building -> room.building, number -> room.number); notes(body)"
    )


def test_messages_share_the_schema_as_a_prefix() -> None:
    asked = sql_messages("t(a)", "Which a?")
    answered = sql_messages("t(a)", "Which a?", "SELECT a FROM t")
    assert answered[:2] == asked
    assert [message.role for message in answered] == ["system", "user", "assistant"]
    assert "t(a)" in asked[0].content


@pytest.mark.parametrize("name", [*sorted(RESERVED_WORDS), "plain", "a b", 'a"b', "1st", "naïve", "", "Key", "year"])
def test_quoted_identifiers_work_everywhere(name: str) -> None:
    connection = sqlite3.connect(":memory:")
    always = '"' + name.replace('"', '""') + '"'
    connection.execute(f"CREATE TABLE {always} ({always} INTEGER)")
    connection.execute(f"INSERT INTO {always} VALUES (7)")
    q = quote_identifier(name)
    assert connection.execute(f"SELECT {q}.{q} FROM {q} WHERE {q} > 1 ORDER BY {q}").fetchall() == [(7,)]


def test_plain_names_stay_bare() -> None:
    assert quote_identifier("order_items") == "order_items"
    assert quote_identifier("year") == "year"
    assert quote_identifier("Order") == '"Order"'


@pytest.mark.parametrize("value", ["it's", "''", "a\nb", "%", 3, -2.5, 1e300])
def test_literals_come_back(value: str | float) -> None:
    assert sqlite3.connect(":memory:").execute(f"SELECT {quote_literal(value)}").fetchone() == (value,)


def problem(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_schema(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_databases_that_cannot_be_used(tmp_path: Path) -> None:
    missing = tmp_path / "missing.sqlite"
    assert "no such file" in problem(missing)
    assert not missing.exists()
    assert "is a folder" in problem(tmp_path)
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    assert "is empty" in problem(empty)
    text = tmp_path / "text.sqlite"
    text.write_text("name,city\nAnna,Berlin\n" * 200)
    assert "is not a SQLite database" in problem(text)
    torn = tmp_path / "torn.sqlite"
    whole = build(tmp_path / "whole.sqlite", "CREATE TABLE t (a); CREATE TABLE u (b);")
    torn.write_bytes(whole.read_bytes()[:3000])
    assert "damaged" in problem(torn)
    bare = build(tmp_path / "bare.sqlite", "CREATE TABLE t (a); DROP TABLE t;")
    assert "it holds no table" in problem(bare)


def test_a_locked_database_is_named(tmp_path: Path) -> None:
    database = build(tmp_path / "a.sqlite", "CREATE TABLE t (a);")
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        assert "locked by another program" in problem(database)
    finally:
        other.close()
    assert read_schema(database).tables[0].name == "t"


def test_the_connection_cannot_write(tmp_path: Path) -> None:
    database = build(tmp_path / "odd name?#%.sqlite", "CREATE TABLE t (a);")
    connection = open_read_only(database)
    with pytest.raises(sqlite3.OperationalError):
        connection.execute("INSERT INTO t VALUES (1)")


def test_text_that_is_not_utf8_is_kept(tmp_path: Path) -> None:
    database = build(tmp_path / "a.sqlite", "CREATE TABLE t (a TEXT); INSERT INTO t VALUES (CAST(x'e9' AS TEXT));")
    assert (
        open_read_only(database).execute("SELECT a FROM t").fetchone()[0].encode("utf-8", "surrogateescape")
        == b"\xe9"
    )


def test_real_databases_are_read(shared_data: Path) -> None:
    for name in ("concert_singer", "car_1", "world_1", "college_2", "flight_4"):
        path = shared_data / "spider_en" / "database" / name / f"{name}.sqlite"
        schema = read_schema(path)
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        for table in schema.tables:
            columns = ", ".join(quote_identifier(column.name) for column in table.columns)
            cursor = connection.execute(f"SELECT {columns} FROM {quote_identifier(table.name)} LIMIT 1")
            star = connection.execute(f"SELECT * FROM {quote_identifier(table.name)} LIMIT 0")
            assert [d[0] for d in cursor.description] == [d[0] for d in star.description]
