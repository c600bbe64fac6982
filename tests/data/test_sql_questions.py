"""Text-to-SQL lessons from Spider and BIRD themselves, and from databases made here."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from fitune.data.schema_files import read_schema_file
from fitune.data.schema_prompts import STYLES, cut_schema, sample_values, words_of, write_schema
from fitune.data.sql_questions import find_databases, make_lessons, read_questions, tables_of
from fitune.data.text_to_sql import read_schema
from fitune.errors import InputError
from fitune.evaluate.sql_execution import run_for_check


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT);"
            "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers(id), day DATE);"
            'CREATE TABLE "odd table" (a, "b c" REAL);'
            "INSERT INTO customers VALUES (1, 'Ann''s', 'Rome'), (2, 'Bo', NULL);"
        )
    return path


def test_create_statements_make_the_same_database_again(shop: Path, tmp_path: Path, shared_data: Path) -> None:
    files = [shop, *sorted((shared_data / "spider_en" / "database").rglob("*.sqlite"))[:40]]
    for file in files:
        schema = read_schema(file)
        again = tmp_path / f"{file.stem}-again.sqlite"
        with sqlite3.connect(again) as connection:
            connection.executescript(write_schema(schema, "create", sample_values(file, schema, 2)))
        copy = read_schema(again)
        assert [(t.name, [c.name for c in t.columns], t.primary_key) for t in copy.tables if not t.is_view] == [
            (t.name, [c.name for c in t.columns], t.primary_key) for t in schema.tables
        ], file.stem
        for before, after in zip(schema.tables, copy.tables, strict=True):
            assert set(after.foreign_keys) == set(before.foreign_keys), file.stem


def test_the_list_says_types_keys_and_values(shop: Path) -> None:
    schema = read_schema(shop)
    text = write_schema(schema, "list", sample_values(shop, schema, 2))
    assert text.splitlines()[:5] == [
        "customers:",
        "- id: INTEGER; primary key; e.g. 1, 2",
        "- name: TEXT; e.g. 'Ann''s', 'Bo'",
        "- city: TEXT; e.g. 'Rome'",
        "",
    ]
    assert "- customer_id: INTEGER; -> customers.id" in text
    assert '"odd table":\n- a\n- "b c": REAL' in text


def test_spiders_tables_json_says_what_the_databases_say(shared_data: Path) -> None:
    folder = shared_data / "spider_en"
    schemas = read_schema_file(folder / "tables.json")
    assert len(schemas) == 166
    alike = 0
    for name, path in find_databases(folder / "database").items():
        if name not in schemas:
            continue
        real = {t.name.lower(): [c.name.lower() for c in t.columns] for t in read_schema(path).tables}
        told = {t.name.lower(): [c.name.lower() for c in t.columns] for t in schemas[name].tables}
        alike += real == told
    assert alike >= 150
    perpetrator = schemas["perpetrator"]
    assert perpetrator.table("perpetrator").foreign_keys[0].parent == "people"
    assert perpetrator.table("people").primary_key == ("People_ID",)


def test_birds_questions_have_evidence_difficulty_and_descriptions(shared_data: Path) -> None:
    folder = shared_data / "bird_mini_dev"
    questions = read_questions(folder / "mini_dev_sqlite.json")
    assert len(questions) == 500
    assert {question.difficulty for question in questions} == {"simple", "moderate", "challenging"}
    schemas = read_schema_file(folder / "dev_tables.json")
    assert {question.database for question in questions} <= schemas.keys()
    assert schemas["debit_card_specializing"].table("yearmonth").primary_key == ("CustomerID", "Date")
    lessons = make_lessons(questions, {}, schemas, None, "list")
    assert (len(lessons.samples), lessons.unchecked) == (500, 0)
    assert make_lessons(questions, {}, schemas, run_for_check, "list").unchecked == 500
    first = lessons.samples[0]
    assert first.extra == {"database": "debit_card_specializing", "difficulty": "simple"}
    assert "- Segment: text; client segment" in first.messages[0].content
    assert first.messages[1].content.endswith(questions[0].evidence)
    assert first.messages[2].content == questions[0].sql


def test_a_budget_never_takes_a_table_that_the_query_reads(shared_data: Path) -> None:
    folder = shared_data / "bird_mini_dev"
    questions, schemas = read_questions(folder / "mini_dev_sqlite.json"), read_schema_file(folder / "dev_tables.json")
    for style in STYLES:
        lessons = make_lessons(questions, {}, schemas, None, style, max_tokens=900, count=len)
        assert lessons.cut > 100
        by_line = {question.origin.line: question for question in questions}
        for sample in lessons.samples:
            assert sample.origin is not None
            asked, text = by_line[sample.origin.line], sample.messages[0].content
            known = {table.name.lower(): table.name for table in schemas[asked.database].tables}
            for name in tables_of(asked.sql):
                assert known[name] in text
        assert all("take" in sentence and "are allowed" in sentence for _, sentence in lessons.problems)
        assert len(lessons.samples) + lessons.left_out == 500


def test_tables_that_the_question_speaks_of_come_first(shop: Path) -> None:
    schema = read_schema(shop)
    smaller = cut_schema(schema, "How many orders per day?", 40, lambda part: len(write_schema(part)), ())
    assert [table.name for table in smaller.tables] == ["orders"]
    assert smaller.tables[0].foreign_keys == ()
    assert cut_schema(schema, "x", 10_000, lambda part: len(write_schema(part))) is schema
    assert words_of("the customerIds of NEW_cities and 東京") == {"customer", "ids", "new", "city", "東京"}


def test_tables_of_a_query() -> None:
    assert tables_of("WITH x AS (SELECT * FROM A) SELECT * FROM x JOIN `B c` ON 1 WHERE d IN (SELECT e FROM F)") == {
        "a", "b c", "f",
    }  # fmt: skip
    assert {"a"} <= tables_of("SELECT ((( FROM A")


def test_every_gold_query_of_spiders_dev_runs(shared_data: Path) -> None:
    folder = shared_data / "spider_en"
    questions = read_questions(folder / "dev.json")
    lessons = make_lessons(questions, find_databases(folder / "database"), {}, run_for_check)
    assert (len(lessons.samples), lessons.left_out) == (1034, 0)
    assert len(lessons.databases) == 20


def test_what_cannot_be_taught_is_listed(shop: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    rows = [
        {"question": "How many?", "query": "SELECT count(*) FROM orders", "db_id": "shop"},
        {"question": "Broken", "query": "SELECT missing FROM orders", "db_id": "shop"},
        {"question": "Elsewhere", "query": "SELECT 1", "db_id": "none"},
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    lessons = make_lessons(read_questions(path), find_databases(tmp_path), {}, run_for_check)
    assert (len(lessons.samples), lessons.left_out) == (1, 2)
    said = [sentence for _, sentence in lessons.problems]
    assert "its query does not run: no such column: missing" in said[0]
    assert said[1] == "there is no database called none, nor a schema of it"
    path.write_text(json.dumps([{"question": "q", "db_id": "shop"}]), encoding="utf-8")
    with pytest.raises(InputError, match="line 1: none of SQL, query, sql is there as text"):
        read_questions(path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "shop.db").write_bytes(shop.read_bytes())
    with pytest.raises(InputError, match="two databases are called shop"):
        find_databases(tmp_path)
    (tmp_path / "tables.json").write_text('[{"db_id": "x"}]', encoding="utf-8")
    with pytest.raises(InputError, match="entry 1 is no schema of a database: table_names_original"):
        read_schema_file(tmp_path / "tables.json")
