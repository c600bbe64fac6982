"""`fitune chat`: one question, a conversation from a pipe, and a database asked in words."""

from __future__ import annotations

import io
import sqlite3
import sys
from pathlib import Path

import pytest
from command_line import TrainedRun, call, facts_of

from fitune.cli import chat


def test_one_question(trained: TrainedRun) -> None:
    facts = facts_of("chat", trained.folder, "--prompt", "What is 3 plus 3?", "--max-new-tokens", 12)
    assert facts["answer"]
    assert "<|im_end|>" not in facts["answer"]
    code, out, err = call("chat", trained.folder, "--prompt", "What is 3 plus 3?", "--max-new-tokens", 12)
    assert (code, out.strip()) == (0, facts["answer"]), err


def test_a_conversation_from_a_pipe_ends_with_it(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 3 plus 3?\n/new\n\n"))
    code, out, err = call("chat", trained.folder, "--max-new-tokens", 4)
    assert code == 0, err
    assert out.strip()


def test_a_query_is_run_and_its_rows_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    database = tmp_path / "shop.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE item (name TEXT, price REAL)")
        connection.executemany("INSERT INTO item VALUES (?, ?)", [("pen\x1b[2J", 1.5), (None, 4.0)] * 15)
    connection.close()
    facts = chat._run_sql(database, "SQL: SELECT name, price FROM item;", aloud=True)
    assert facts["sql"] == "SELECT name, price FROM item"
    assert (len(facts["rows"]), facts["more_rows"]) == (chat.SHOWN_ROWS, True)
    shown = capsys.readouterr().out
    assert "pen?[2J" in shown
    assert "\x1b" not in shown
    assert "more than 20 rows" in shown
    before = database.read_bytes()
    for sql in ("DELETE FROM item", "SELECT nothing FROM item", ""):
        assert chat._run_sql(database, sql, aloud=False)["rows"] in (None, [])
    assert database.read_bytes() == before


def test_a_database_is_asked(trained: TrainedRun, tmp_path: Path) -> None:
    database = tmp_path / "shop.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE item (name TEXT, price REAL)")
    connection.close()
    facts = facts_of(
        "chat", trained.folder, "--database", database, "--prompt", "How many items?", "--max-new-tokens", 8
    )
    assert set(facts) == {"model", "question", "answer", "sql", "rows", "more_rows", "error"}


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("no database at all")
    (tmp_path / "empty.sqlite").write_bytes(b"")
    for arguments, said in (
        (("bundled", "--prompt", "x", "--database", tmp_path / "none.sqlite"), "no such file"),
        (("bundled", "--prompt", "x", "--database", tmp_path / "empty.sqlite"), "is empty"),
        (("bundled", "--prompt", "x", "--database", tmp_path / "text.sqlite"), "is not a SQLite database"),
        (("bundled", "--prompt", "x", "--system", "y", "--database", tmp_path / "text.sqlite"), "leave one out"),
        (("bundled", "--json"), "--prompt"),
        (("bundled", "--prompt", " "), "--prompt is empty"),
        ((tmp_path, "--prompt", "x"), "is no run (config.yaml)"),
    ):
        code, out, err = call("chat", *arguments)
        assert (code, out) == (2, ""), arguments
        assert said in err
