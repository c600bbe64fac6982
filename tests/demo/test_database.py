from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pytest

from fitune.data.text_to_sql import read_schema, serialise_schema
from fitune.demo.database import build_demo_database, demo_rows
from fitune.errors import FituneError


def dump(path: Path) -> str:
    connection = sqlite3.connect(path)
    text = "\n".join(connection.iterdump())
    connection.close()
    return hashlib.sha256(text.encode()).hexdigest()


def test_one_seed_one_database(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_demo_database(tmp_path / name, seed)
    assert dump(tmp_path / "a") == dump(tmp_path / "b") != dump(tmp_path / "c")
    build_demo_database(tmp_path / "c", 0)  # replaces what was there
    assert dump(tmp_path / "c") == dump(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_are_related_and_realistic(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "demo.sqlite"
    build_demo_database(path, seed)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    rows = demo_rows(seed)
    assert 1_500 < sum(map(len, rows.values())) < 4_000
    for table in ("customers", "employees", "products", "categories"):
        names = [row[0] for row in connection.execute(f"SELECT name FROM {table}")]
        assert len(set(names)) == len(names)
    for column in ("customers.phone", "products.color", "orders.payment", "reviews.comment"):
        table, name = column.split(".")
        (nulls,) = connection.execute(f"SELECT AVG({name} IS NULL) FROM {table}").fetchone()
        assert 0.03 < nulls < 0.5, column
    early = "SELECT COUNT(*) FROM orders JOIN customers ON customer_id = customers.id WHERE order_date < signup_date"
    assert connection.execute(early).fetchone() == (0,)
    without = "SELECT COUNT(*) FROM customers WHERE id NOT IN (SELECT customer_id FROM orders)"
    assert connection.execute(without).fetchone()[0] > 10


def test_the_schema_is_short(tmp_path: Path) -> None:
    build_demo_database(tmp_path / "demo.sqlite")
    schema = read_schema(tmp_path / "demo.sqlite")
    assert len(schema.tables) >= 5
    assert len(serialise_schema(schema)) < 500  # 126 tokens of SmolLM2's tokenizer


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FituneError, match=r"file/demo\.sqlite: the demo database cannot be written"):
        build_demo_database(tmp_path / "file" / "demo.sqlite")
