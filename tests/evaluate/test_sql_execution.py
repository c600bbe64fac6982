from __future__ import annotations

import json
import random
import re
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest

from fitune.errors import FituneError, InputError
from fitune.evaluate.sql_execution import execution_accuracy, extract_sql, has_top_level_order, same_answer


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(
        """
        CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT, price REAL, stock INTEGER);
        INSERT INTO items VALUES (1, 'desk', 10.0, 3), (2, 'lamp', 2.5, NULL), (3, 'rug', 7.0, 3), (4, 'bed', 7.0, 0);
        """
    )
    connection.close()
    return path


def outcome(prediction: str, gold: str, database: Path, timeout_seconds: float = 5.0) -> str:
    return execution_accuracy([prediction], [gold], database, timeout_seconds).outcomes[0].outcome


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("SELECT name FROM items ORDER BY id DESC", "SELECT name FROM items", "correct"),
        ("SELECT name FROM items ORDER BY id DESC", "SELECT name FROM items ORDER BY id", "wrong"),
        ("SELECT name FROM items ORDER BY id", "SELECT name FROM items ORDER BY id", "correct"),
        # the order of a subquery is not the order of the answer
        (
            "SELECT name FROM items WHERE price = 7 ORDER BY id DESC",
            "SELECT name FROM (SELECT * FROM items WHERE price = 7 ORDER BY id)",
            "correct",
        ),
        ("SELECT stock FROM items", "SELECT stock FROM items", "correct"),  # NULL = NULL
        ("SELECT DISTINCT price FROM items", "SELECT price FROM items", "wrong"),  # a bag, not a set
        ("SELECT price, name FROM items", "SELECT name, price FROM items", "wrong"),  # order of columns
        ("SELECT name, price FROM items", "SELECT name FROM items", "wrong"),
        ("SELECT 1.0", "SELECT 1", "correct"),
        ("SELECT 1 / 3.0 * 3", "SELECT 1", "correct"),
        ("SELECT 1.00001", "SELECT 1.0", "wrong"),
        ("SELECT '1'", "SELECT 1", "wrong"),
        ("SELECT 'Desk'", "SELECT 'desk'", "wrong"),
        ("SELECT name FROM items WHERE id > 9", "SELECT name FROM items WHERE id > 8", "correct"),
        ("SELECT nme FROM items", "SELECT name FROM items", "error"),
        ("SELEKT", "SELECT name FROM items", "error"),
        ("SELECT 1; SELECT 1", "SELECT 1", "error"),
        ("", "SELECT 1", "empty"),
        (" ; ", "SELECT 1", "empty"),
        ("-- nothing", "SELECT 1", "wrong"),
        ("SELECT '\x00", "SELECT 1", "error"),
        ("SELECT '\ud800'", "SELECT 1", "error"),
    ],
)
def test_outcomes(prediction: str, gold: str, expected: str, shop: Path) -> None:
    assert outcome(prediction, gold, shop) == expected


@pytest.mark.parametrize(
    "prediction",
    [
        "DELETE FROM items",
        "DROP TABLE items",
        "INSERT INTO items (name) VALUES ('x') RETURNING name",
        "CREATE TEMP TABLE t AS SELECT 1",
        "ATTACH 'other.sqlite' AS other",
        "PRAGMA query_only = OFF",
        "SELECT load_extension('x')",
        "VACUUM INTO 'copy.sqlite'",
        "BEGIN EXCLUSIVE",
    ],
)
def test_predictions_can_only_read(
    prediction: str, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = shop.read_bytes()
    assert outcome(prediction, "SELECT 1", shop) == "error"
    assert shop.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["shop.sqlite"]


def test_a_missing_database_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        execution_accuracy(["SELECT 1"], ["SELECT 1"], tmp_path / "never.sqlite")
    assert not list(tmp_path.iterdir())


def test_time_and_row_limits(shop: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "
    start = time.monotonic()
    assert outcome(endless + "count(*) FROM n", "SELECT 1", shop, 0.2) == "timeout"
    assert outcome(endless + "i FROM n", "SELECT 1", shop, 0.2) == "wrong"  # two rows are enough to know
    assert outcome("SELECT hex(zeroblob(1000000000))", "SELECT 1", shop) == "error"
    assert time.monotonic() - start < 3


def test_a_gold_that_fails_is_an_error(shop: Path) -> None:
    with pytest.raises(FituneError, match="gold query 2"):
        execution_accuracy(["SELECT 1", "SELECT 1"], ["SELECT 1", "SELECT nme FROM items"], shop)
    with pytest.raises(FituneError, match="2 predictions for 1"):
        execution_accuracy(["SELECT 1", "SELECT 1"], ["SELECT 1"], shop)


def test_scores_count_every_prediction(shop: Path) -> None:
    scores = execution_accuracy(["SELECT 1", "SELECT 2", "nonsense", ""], ["SELECT 1"] * 4, shop)
    assert scores.accuracy == 0.25
    assert scores.counts == {"correct": 1, "wrong": 1, "error": 1, "timeout": 0, "empty": 1}
    assert "syntax error" in scores.outcomes[2].message


def test_rows_that_rounding_reorders_still_match() -> None:
    left = [(1.0, 2.0), (1.0 + 1e-9, 1.0)]
    right = [(1.0, 1.0), (1.0 + 1e-9, 2.0)]
    assert same_answer(left, right, is_ordered=False)
    assert not same_answer(left, [(1.0, 1.0), (1.0, 3.0)], is_ordered=False)
    assert not same_answer([(1,), (1,), (2,)], [(1,), (2,), (2,)], is_ordered=False)
    assert same_answer([(None, b"x", "t")], [(None, b"x", "t")], is_ordered=True)


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 1", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT a FROM t WHERE b = 'x ORDER BY y'", False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("WITH x AS (SELECT 1 ORDER BY 1) SELECT * FROM x", False),
        ('SELECT "order by" FROM t', False),
    ],
)
def test_top_level_order(sql: str, expected: bool) -> None:
    assert has_top_level_order(sql) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SELECT name FROM t", "SELECT name FROM t"),
        ("  SELECT name FROM t;  ", "SELECT name FROM t"),
        ("```sql\nSELECT a\nFROM t;\n```\nThis lists every a.", "SELECT a\nFROM t"),
        ("Here it is:\n```\nSELECT a FROM t\n", "SELECT a FROM t"),
        ("Some code:\n```python\nx = 1\n```\n```sqlite\nSELECT 2\n```", "SELECT 2"),
        ("SQL: SELECT a FROM t", "SELECT a FROM t"),
        ("SELECT a FROM t; SELECT b FROM t", "SELECT a FROM t"),
        ("SELECT ';' FROM t; that is all", "SELECT ';' FROM t"),
        ("SELECT a FROM t\n\nThis query returns a.", "SELECT a FROM t"),
        ("SELECT a\n\nFROM t", "SELECT a\n\nFROM t"),
        ("The answer is SELECT a FROM t", "SELECT a FROM t"),
        ("Question: which a?\nSELECT a FROM t", "SELECT a FROM t"),
        ("with x as (select 1) select * from x", "with x as (select 1) select * from x"),
        ("SELECT a FROM t<|im_end|>\n<|im_start|>user", "SELECT a FROM t"),
        ("Question: Select the a of t.\nSQL: SELECT a FROM t", "SELECT a FROM t"),
        ("With this you get all of them:\nSELECT a FROM t", "SELECT a FROM t"),
        ("I do not know", "I do not know"),
        ("", ""),
    ],
)
def test_extract_sql(text: str, expected: str) -> None:
    assert extract_sql(text) == expected


def reference_agrees(database: Path, prediction: str, gold: str) -> bool:
    """An independent, simpler reading of execution accuracy: exact rows, floats rounded."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    connection.text_factory = bytes
    try:
        want = connection.execute(gold).fetchall()
        try:
            have = connection.execute(prediction).fetchall()
        except sqlite3.Error:
            return False
    finally:
        connection.close()

    def normal(rows: list[tuple]) -> list[tuple]:
        return [tuple(float(f"{v:.9g}") if isinstance(v, int | float) else v for v in row) for row in rows]

    outer = re.sub(r"\([^()]*\)", "", re.sub(r"\([^()]*\)", "", gold)).lower()
    if "order by" in outer:
        return normal(have) == normal(want)
    return Counter(normal(have)) == Counter(normal(want))


def mutate(sql: str, rng: random.Random) -> str:
    """A query that asks for something else."""
    changes = [
        lambda s: re.sub(r"\bselect\b", "SELECT 'x' || ", s, count=1, flags=re.IGNORECASE),
        lambda s: f"SELECT * FROM ({s}) LIMIT 0",
        lambda s: f"SELECT *, 1 FROM ({s})",
        lambda s: f"SELECT * FROM ({s}) UNION ALL SELECT * FROM ({s})",
    ]
    return rng.choice(changes)(sql)


def test_spider_gold_is_right_and_mutated_gold_wrong(shared_data: Path) -> None:
    items = json.loads((shared_data / "spider_en" / "dev.json").read_text())
    folder = shared_data / "spider_en" / "database"
    rng = random.Random(0)
    by_database: dict[str, list[str]] = {}
    for item in items:
        by_database.setdefault(item["db_id"], []).append(item["query"])
    compared = wrong = 0
    for name, golds in by_database.items():
        database = folder / name / f"{name}.sqlite"
        golds = sorted(set(golds))
        assert execution_accuracy(golds, golds, database).accuracy == 1.0, name
        mutated = [mutate(gold, rng) for gold in golds]
        shifted = golds[1:] + golds[:1]
        for predictions in (mutated, shifted):
            scores = execution_accuracy(predictions, golds, database)
            for prediction, gold, found in zip(predictions, golds, scores.outcomes, strict=True):
                assert found.is_correct == reference_agrees(database, prediction, gold), (prediction, gold)
                compared += 1
        wrong += sum(not found.is_correct for found in execution_accuracy(mutated, golds, database).outcomes)
    assert compared > 900
    assert wrong > 0.9 * compared / 2
