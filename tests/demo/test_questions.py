from __future__ import annotations

import dataclasses
import re
import sqlite3
import string
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitune.demo.database import build_demo_database
from fitune.demo.heldout import HELD_OUT
from fitune.demo.join_forms import JOIN_FORMS
from fitune.demo.phrasings import TRAINED
from fitune.demo.questions import FORMS, QuestionSets, check_disjoint, generate_questions
from fitune.errors import FituneError, InputError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.sqlite"
    build_demo_database(path)
    return path


@pytest.fixture(scope="module")
def sets(demo: Path) -> QuestionSets:
    return generate_questions(demo)


def build(path: Path, script: str) -> Path:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    return path


def assert_golds_answer(database: Path, sets: QuestionSets) -> None:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    connection.text_factory = bytes
    for question in (*sets.train, *sets.unseen_values, *sets.unseen_phrasings):
        rows = connection.execute(question.sql).fetchall()
        assert rows, question
        assert any(value is not None for row in rows for value in row), question
        assert rows != [(0,)], question
    connection.close()


# wordings


def test_every_form_has_enough_wordings() -> None:
    names = [form.name for form in FORMS]
    assert len(names) == len(set(names)) >= 24
    assert set(TRAINED) == set(HELD_OUT) == set(names)
    assert all(len(set(TRAINED[name])) >= 8 for name in names)
    assert all(len(set(HELD_OUT[name])) >= 3 for name in names)


def test_no_wording_serves_twice() -> None:
    wordings = [text for table in (TRAINED, HELD_OUT) for texts in table.values() for text in texts]
    assert [text for text, count in Counter(wordings).items() if count > 1] == []


# The table's own words come before and after in all of these: what must be there is the returned column, and
# each value. Without them the query could not be inferred from the question.
NEEDED = {
    "both": "cfnvw",
    "either": "cfgvw",
    "between": "cnvw",
    "one_of": "cfvw",
    "two_columns": "cd",
    "join_columns": "cd",
    "join_total": "cn",
    "top_n": "cnk",
    "bottom_n": "cnk",
    "group_having": "fk",
    "join_having": "ck",
    "average_where": "nfv",
    "group_average": "fn",
    "two_hop": "cfv",
    "with_child": "cfv",
    "join_filter": "cfv",
    "join_count_where": "fv",
    "equals": "cfv",
    "missing": "cf",
    "sorted_up": "cn",
    "sorted_down": "cn",
    "above_average": "cn",
}


@pytest.mark.parametrize("form", sorted(NEEDED))
def test_wordings_name_all_that_the_query_needs(form: str) -> None:
    for text in (*TRAINED[form], *HELD_OUT[form]):
        fields = {name for _, name, _, _ in string.Formatter().parse(text) if name}
        letters = {re.sub(r"^a_|s$", "", name) for name in fields}
        assert set(NEEDED[form]) <= letters, text


# the demo database


def test_demo_sets_have_their_sizes(demo: Path, sets: QuestionSets) -> None:
    assert len(sets.train) == 1_500
    assert len(sets.unseen_values) == len(sets.unseen_phrasings) == 320
    assert sets.skipped == {}
    assert sets.notes == ()
    assert len(sets.forms) == len(FORMS)
    for questions in (sets.train, sets.unseen_values, sets.unseen_phrasings):
        counts = Counter(question.form for question in questions)
        assert len(counts) == len(FORMS)
        largest = 2 if questions is sets.train else 1  # of forms over several tables
        assert max(counts.values()) <= largest * 1.3 * len(questions) / len(FORMS)
        assert len({question.question for question in questions}) == len(questions)
    assert_golds_answer(demo, sets)


def test_training_has_twice_as_many_questions_over_several_tables(sets: QuestionSets) -> None:
    trained, asked = (Counter(question.form for question in some) for some in (sets.train, sets.unseen_values))
    # forms that draw values never run out of questions on this database
    single, joined = (
        [form.name for form in FORMS if form.draws_values and (form in JOIN_FORMS) == over_several]
        for over_several in (False, True)
    )
    usual = max(trained[name] for name in single)
    assert all(2 * usual - 4 <= trained[name] <= 2 * usual for name in joined), trained
    assert max(asked.values()) <= 2 + min(asked[name] for name in joined), asked


def test_the_seed_decides(demo: Path, sets: QuestionSets) -> None:
    start = time.monotonic()
    again = generate_questions(demo)
    assert time.monotonic() - start < 10
    assert again == sets
    assert generate_questions(demo, seed=1).train != sets.train


@pytest.mark.parametrize("seed", range(5))
def test_held_out_questions_are_held_out(demo: Path, seed: int) -> None:
    """Counted here without the generator's own bookkeeping: from the texts and the literals in the SQL."""
    sets = generate_questions(demo, seed=seed)
    report = check_disjoint(sets)
    assert report.train == len(sets.train)
    assert "0 held-out" in str(report)
    questions = {question.question.lower() for question in sets.train}
    queries = {question.sql.lower() for question in sets.train}
    trained = {pair for question in sets.train for pair in compared_literals(question.sql)}
    for question in sets.unseen_values:
        assert question.question.lower() not in questions
        assert question.sql.lower() not in queries
        # strftime('%Y', ...) = '2023' is a slot of its own, seen by its own pattern
        assert not compared_literals(question.sql) & trained, question
        assert question.phrasing_id.split("/")[1] == "trained"
    for question in sets.unseen_phrasings:
        assert question.question.lower() not in questions
        assert question.sql.lower() not in queries
        assert question.phrasing_id.split("/")[1] == "held_out"


def compared_literals(sql: str) -> set[tuple[str, str]]:
    """(table.column, literal) of every comparison with = or IN in a query of the generator's style."""
    table = re.findall(r"FROM (\w+)", sql)[-1]
    found = re.findall(r"([\w.]+) (?:=|IN) \(?('(?:[^']|'')*'|[\d.]+)", sql)
    return {(name if "." in name else f"{table}.{name}", value) for name, value in found}


def test_the_check_can_fail(sets: QuestionSets) -> None:
    for name in ("unseen_values", "unseen_phrasings"):
        leaked = dataclasses.replace(sets, **{name: (*getattr(sets, name), sets.train[0])})
        with pytest.raises(FituneError, match="not held out"):
            check_disjoint(leaked)
    valued = next(question for question in sets.train if question.form == "equals")
    other = dataclasses.replace(valued, question="Something else?", sql="SELECT 1")
    with pytest.raises(FituneError, match="is also trained"):
        check_disjoint(dataclasses.replace(sets, unseen_values=(other,)))
    reworded = dataclasses.replace(valued, question="Something else?", values=(), phrasing_id="equals/held_out/1")
    with pytest.raises(FituneError, match="this query is also trained"):
        check_disjoint(dataclasses.replace(sets, unseen_phrasings=(reworded,)))


def test_one_question_has_one_query(sets: QuestionSets) -> None:
    meaning: dict[str, str] = {}
    for question in (*sets.train, *sets.unseen_values, *sets.unseen_phrasings):
        assert meaning.setdefault(question.question.lower(), question.sql) == question.sql


def test_keys_are_not_measured_or_filtered(sets: QuestionSets) -> None:
    for question in (*sets.train, *sets.unseen_values):
        assert not re.search(r"(?:SUM|AVG|MIN|MAX)\((?:\w+\.)?(?:\w+_)?id\)", question.sql), question
        assert not re.search(r"(?:\w+_)?\bid (?:=|>|<|BETWEEN|LIKE) ", question.sql.split(" WHERE ")[-1]), question


def test_forms_can_be_chosen(demo: Path) -> None:
    sets = generate_questions(demo, forms=["equals", "count_rows"], train_size=50, held_out_size=10)
    assert set(sets.forms) == {"equals", "count_rows"}
    with pytest.raises(InputError, match="no form of question is called equal;"):
        generate_questions(demo, forms=["equal"])


# other databases


def test_one_table_gives_fewer_forms_and_says_which(tmp_path: Path) -> None:
    database = build(
        tmp_path / "a.sqlite",
        """
        CREATE TABLE cities (name TEXT, people INTEGER, photo BLOB);
        INSERT INTO cities VALUES ('Berlin', 3700, x'00'), ('Paris', 2100, x'01'), ('Rome', 2800, x'02'),
                                  ('Graz', 300, x'03'), ('Cork', 200, NULL), ('Lyon', 520, x'04');
        """,
    )
    sets = generate_questions(database)
    assert_golds_answer(database, sets)
    assert "foreign key" in sets.skipped["join_count"]
    assert "date" in sets.skipped["in_year"]
    assert any("cities.photo" in note and "BLOB" in note for note in sets.notes)
    assert any("1500 training questions were asked for; this database supplies" in note for note in sets.notes)
    assert set(sets.forms) & set(sets.skipped) == set()
    assert set(sets.forms) | set(sets.skipped) == {form.name for form in FORMS}
    assert not any("photo" in question.sql for question in sets.train)


def test_odd_names_a_view_and_an_empty_table(tmp_path: Path) -> None:
    rows = ", ".join(f"({i}, 'name''s {i % 7}', {i * 3}, '2021-0{i % 9 + 1}-11', 'grün {i % 3}')" for i in range(60))
    database = build(
        tmp_path / "a.sqlite",
        f"""
        CREATE TABLE "order" (id INTEGER PRIMARY KEY, "group" TEXT, "unit ""x" INTEGER, "day{{0}}" TEXT,
                              größe TEXT);
        INSERT INTO "order" VALUES {rows};
        CREATE TABLE "select from" ("order" INTEGER REFERENCES "order", "where" TEXT);
        INSERT INTO "select from" SELECT id % 20, 'it''s ' || (id % 5) FROM "order";
        CREATE TABLE empty_shelves (id INTEGER PRIMARY KEY, name TEXT);
        CREATE VIEW "a view" AS SELECT "group", größe FROM "order" WHERE id > 5;
        CREATE TABLE loners (x ANY) ;
        INSERT INTO loners VALUES (1), ('a'), (x'00');
        """,
    )
    sets = generate_questions(database)
    assert_golds_answer(database, sets)
    check_disjoint(sets)
    assert any("table empty_shelves: left aside, it is empty" in note for note in sets.notes)
    assert any('FROM "a view"' in question.sql for question in sets.train)
    assert any('JOIN "order" ON' in question.sql for question in sets.train)
    assert any("'it''s " in question.sql and "it's " in question.question for question in sets.train)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("CREATE TABLE t (a TEXT);", "table t: left aside, it is empty"),
        ("CREATE TABLE t (a BLOB); INSERT INTO t VALUES (NULL);", "it holds only NULL"),
    ],
)
def test_nothing_to_ask(tmp_path: Path, script: str, message: str) -> None:
    database = build(tmp_path / "a.sqlite", script)
    try:
        sets = generate_questions(database)
    except InputError as error:
        assert message in str(error)  # noqa: PT017 - either way the reason must be said
    else:
        assert any(message in note for note in sets.notes)


def test_large_tables_are_sampled(tmp_path: Path) -> None:
    database = build(
        tmp_path / "a.sqlite",
        """
        CREATE TABLE makers (id INTEGER PRIMARY KEY, name TEXT);
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)
            INSERT INTO makers SELECT i, 'maker ' || i FROM n;
        CREATE TABLE parts (id INTEGER PRIMARY KEY, maker_id INTEGER REFERENCES makers, kind TEXT, weight INTEGER);
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
            INSERT INTO parts SELECT i, i % 300 + 1, 'kind ' || (i % 11), i * 7919 % 100000 FROM n;
        """,
    )
    start = time.monotonic()
    sets = generate_questions(database)
    assert time.monotonic() - start < 30
    check_disjoint(sets)
    assert any("FROM parts" in question.sql for question in sets.train)


VARIED = """concert_singer car_1 pets_1 world_1 flight_2 college_1 wta_1 tvshow dog_kennels museum_visit
    voter_1 student_transcripts_tracking hr_1 chinook_1 soccer_1 cre_Doc_Template_Mgt battle_death orchestra
    real_estate_properties machine_repair csu_1 small_bank_1 yelp sports_competition""".split()  # noqa: SIM905


def test_real_databases(shared_data: Path) -> None:
    tried = 0
    for name in VARIED:
        database = shared_data / "spider_en" / "database" / name / f"{name}.sqlite"
        if not database.exists():
            continue
        tried += 1
        try:
            sets = generate_questions(database, train_size=400, held_out_size=120)
        except InputError as error:
            assert "empty" in str(error), name  # its tables have no rows  # noqa: PT017
            continue
        check_disjoint(sets)
        assert_golds_answer(database, sets)
        assert len(sets.forms) >= 8, name
        assert set(sets.forms) | set(sets.skipped) == {form.name for form in FORMS}
    assert tried >= 15


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=12)
cells = st.one_of(
    st.none(), st.integers(-(10**12), 10**12), st.floats(allow_nan=False), st.text(max_size=8), st.binary(max_size=3)
)
REPEATED = st.sampled_from([None, "a b", "it's", "a", "A", "{x}", "%_", "2020-01-31", "b"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tables=st.lists(names, min_size=1, max_size=3, unique_by=lambda n: n.lower()),
    columns=st.lists(names, min_size=1, max_size=4, unique_by=lambda n: n.lower()),
    rows=st.lists(st.tuples(cells, REPEATED, st.integers(0, 5), cells), max_size=25),
)
def test_any_schema(tmp_path: Path, tables: list[str], columns: list[str], rows: list[tuple]) -> None:
    path = tmp_path / "any.sqlite"
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)

    def quoted(name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    tables = [table for table in tables if not table.lower().startswith("sqlite_")] or ["t"]
    for number, table in enumerate(tables):
        parent = f" REFERENCES {quoted(tables[number - 1])}" if number else " PRIMARY KEY"
        head = f"{quoted(columns[0])}{parent if len(columns) > 1 and rows else ''}"
        connection.execute(f"CREATE TABLE {quoted(table)} ({', '.join([head, *map(quoted, columns[1:])])})")
        places = ", ".join("?" * len(columns))
        connection.executemany(
            f"INSERT OR IGNORE INTO {quoted(table)} VALUES ({places})", [row[: len(columns)] for row in rows]
        )
    connection.commit()
    connection.close()
    try:
        sets = generate_questions(path, train_size=120, held_out_size=40)
    except InputError:
        return
    check_disjoint(sets)
    assert_golds_answer(path, sets)
