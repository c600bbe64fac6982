"""`fitune evaluate` on real runs and models, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest
import torch
from command_line import TrainedRun, call, facts_of

from fitune.data import read_samples
from fitune.evaluate.task_evaluation import evaluate_task
from fitune.models.find import find_model
from fitune.quant.lease import DecodedAtUse
from fitune.quant.linear import QuantisedLinear
from fitune.train.trained_model import find_trained


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE item (name TEXT, price REAL)")
        connection.executemany("INSERT INTO item VALUES (?, ?)", [("pen", 1.5), ("ink", 4.0)])
    connection.close()
    return path


def questions(folder: Path, *sql: str) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps({"instruction": "Which items?", "output": line}) + "\n" for line in sql))
    return path


def test_a_run_is_measured_as_when_it_was_trained(trained: TrainedRun, tmp_path: Path) -> None:
    facts = facts_of("evaluate", trained.folder, "--html", tmp_path / "report.html")
    for side in ("base", "tuned"):
        assert facts[side]["loss"]["value"] == pytest.approx(
            trained.facts["evaluation"][side]["loss"]["value"], rel=1e-3
        )
    assert "Before and after" in (tmp_path / "report.html").read_text()


def test_queries_are_run_on_the_database(trained: TrainedRun, shop: Path, tmp_path: Path) -> None:
    data = questions(tmp_path, "SELECT name FROM item", "SELECT price FROM item", "SELECT 1")
    facts = facts_of(
        "evaluate", trained.folder, "--data", data, "--task", "sql", "--database", shop, "--limit", 2,
        "--max-new-tokens", 8,
    )  # fmt: skip
    assert (facts["samples"], facts["samples_read"]) == (2, 3)
    for side in ("base", "tuned"):
        assert sum(facts[side]["outcomes"].values()) == 2
        assert 0 <= facts[side]["execution_accuracy"]["value"] <= 1
    assert facts["new_tokens"] > 0


def test_a_bare_model_has_no_base(workplace: Path, one_core: None) -> None:
    code, out, err = call(
        "evaluate", "bundled", "--data", workplace / "sums.jsonl", "--task", "text", "--limit", 2,
        "--max-new-tokens", 2,
    )  # fmt: skip
    assert code == 0, err
    for said in ("score", "value", "BLEU", "Only the first 2 of 12 samples", "de-quantised"):
        assert said in out
    assert "base" not in out.split("score")[1].splitlines()[0]


def test_what_is_refused(trained: TrainedRun, shop: Path, tmp_path: Path) -> None:
    good = questions(tmp_path, "SELECT name FROM item")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.sqlite").write_bytes(b"")
    (tmp_path / "text.sqlite").write_text("no database at all")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(good.read_text() + json.dumps({"instruction": "x", "output": "SELECT nothing FROM item"}) + "\n")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(good.read_text() + '{"instruction": \n')
    sql = ("--task", "sql", "--database")
    for arguments, said in (
        ((tmp_path / "empty", "--task", "text", "--data", good), "is no run (config.yaml)"),
        (("bundled", "--data", good), "--task"),
        (("bundled", "--task", "text"), "--data FILE"),
        (("bundled", "--task", "text", "--data", tmp_path / "none.jsonl"), "no such file"),
        (("bundled", "--task", "text", "--data", broken), "line 2"),
        (("bundled", "--task", "sql", "--data", good), "--database"),
        (("bundled", "--task", "text", "--data", good, "--database", shop), "--database is for task sql"),
        (("bundled", "--data", good, *sql, tmp_path / "none.sqlite"), "no such file"),
        (("bundled", "--data", good, *sql, tmp_path / "empty.sqlite"), "is empty (0 bytes)"),
        (("bundled", "--data", good, *sql, tmp_path / "text.sqlite"), "is not a SQLite database"),
        (("bundled", "--data", wrong, *sql, shop), "line 2: the answer is no query that runs on shop.sqlite"),
    ):
        code, out, err = call("evaluate", *arguments)
        assert (code, out) == (2, ""), arguments
        assert said in err
        assert "Traceback" not in err


def test_a_quantised_model_is_left_as_it_was(trained: TrainedRun, workplace: Path) -> None:
    """Every bit of every weight, what learns, training mode, and how the weights are reached."""
    model = find_trained(str(trained.folder)).build()
    samples = read_samples(workplace / "sums.jsonl")[:2]
    tokenizer = find_model("bundled").tokenizer()
    model.graph.train()
    linears = [module for module in model.graph.modules() if isinstance(module, QuantisedLinear)]
    assert linears

    def state() -> tuple[object, ...]:
        found = hashlib.sha256()
        for name, value in [*model.graph.named_parameters(), *model.graph.named_buffers()]:
            found.update(name.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        learning = [parameter.requires_grad for parameter in model.graph.parameters()]
        training = [module.training for module in model.graph.modules()]
        return found.hexdigest(), learning, training, [type(linear.lease) for linear in linears]

    before = state()
    for with_adapter in (False, True):
        evaluate_task(model, tokenizer, samples, "text", eos_ids=[2], max_new_tokens=3, with_adapter=with_adapter)
        evaluate_task(model, tokenizer, samples, "perplexity", eos_ids=[2], with_adapter=with_adapter)
        assert state() == before
    assert {type(linear.lease) for linear in linears} == {DecodedAtUse}
