"""Scores while a run trains: they change nothing, are those of `fitune evaluate`, and decide where asked to."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import adapter_bits, config_of, run, stop_after

from fitune.config.schema import RunConfig
from fitune.data.reading import read_samples
from fitune.errors import FituneError, InputError, Interrupted
from fitune.evaluate import task_evaluation
from fitune.generate.generation import GenerationStats
from fitune.step.ranks import Ranks
from fitune.train import scoring
from fitune.train.best_weights import best_step
from fitune.train.comparing import evaluate_one
from fitune.train.run import Outcome, plan_run, prepare_run
from fitune.train.run_list import read_run
from fitune.train.scoring import Scorer
from fitune.train.trained_model import find_trained


def scored(place: Path, *more: str) -> RunConfig:
    settings = {
        "data.validation": place / "validation.jsonl", "evaluate.max_new_tokens": 12, "evaluate.batch": 2,
        "train.score_every_steps": 2, "train.score_samples": 4,
    }  # fmt: skip
    own = {one.partition("=")[0] for one in more}
    return config_of(place, *(f"{name}={value}" for name, value in settings.items() if name not in own), *more)


def unscored(config: RunConfig) -> RunConfig:
    train = config.train.model_copy(update={"score_every_steps": None, "score_samples": 50})
    return config.model_copy(update={"train": train})


def lines_of(folder: Path, name: str = "score") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if name in line]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "score_seconds"} for line in lines]


@contextmanager
def quietly(what: str, count: int) -> Iterator[Any]:
    def progress(stats: GenerationStats) -> None: ...

    yield progress


@pytest.fixture(scope="module")
def dropping(place: Path) -> Outcome:
    return run(scored(place, "lora.dropout=0.2", "train.steps=40", "train.score_every_steps=10"), place / "dropping")


def test_the_last_score_is_what_evaluating_the_result_finds(place: Path, dropping: Outcome) -> None:
    """By another model, built from the adapter that was written."""
    found = find_trained(str(dropping.folder.path))
    assert found.config is not None
    settings = found.config.evaluate.model_copy(update={"task": "text"})
    samples = read_samples(str(place / "validation.jsonl"))[:4]
    result = evaluate_one(
        found.build(), found.source, found.config.model_copy(update={"evaluate": settings}), samples, quietly, ""
    )
    last = dropping.scores[-1]
    assert last.step == 40
    assert last.scores == {name: interval.value for name, interval in result.scores.items()}
    assert (last.score_of, last.score) == ("bleu", result.scores["bleu"].value)
    assert last.scores["chrf"] > 0
    assert last.score_samples == 4
    assert len({one.scores["chrf"] for one in dropping.scores}) > 1  # of the model as it was then, not of one model


def test_scores_are_told_everywhere(dropping: Outcome) -> None:
    folder = dropping.folder.path
    lines = lines_of(folder)
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]["scores"] == dropping.scores[-1].scores
    assert json.loads((folder / "summary.json").read_text())["score"] == lines[-1]
    assert read_run(folder).score == lines[-1]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("score/chrf")] == [10, 20, 30, 40]
    assert events.Scalars("score/chrf")[-1].value == pytest.approx(lines[-1]["scores"]["chrf"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.dropout=0.2", "train.neftune_alpha=5", "lora.dora=true"],
        ["train.compute=int8", "train.recompute=layers"],
        ["method=full", "train.compute=bfloat16", "train.learning_rate=0.001", "train.model_dropout=0.1"],
        ["train.backend=reference", "lora.dropout=0.2"],
    ],
)
def test_scoring_changes_no_bit_of_the_run_and_is_gone_on_with(
    place: Path, tmp_path: Path, overrides: list[str]
) -> None:
    """Losses, validations, random numbers, weights; and a run that was stopped makes the same scores."""
    config = scored(place, *overrides, "train.validate_every_steps=2", "train.save_every_steps=2")
    plain, whole = (run(one, tmp_path / name) for one, name in ((unscored(config), "plain"), (config, "whole")))
    assert [one.step for one in whole.scores] == [2, 4, 6]
    assert whole.losses == plain.losses
    assert whole.validation == plain.validation
    assert whole.digest == plain.digest
    ends = [one.folder.path / "checkpoints" / "step-000006" / "tensors.safetensors" for one in (plain, whole)]
    assert ends[0].read_bytes() == ends[1].read_bytes()  # random numbers and the optimizer's states are in it
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(3))
    again = run(config, tmp_path / "parts", resume=True)
    assert again.digest == whole.digest
    assert timeless(lines_of(tmp_path / "parts")) == timeless(lines_of(tmp_path / "whole"))


def test_layers_from_the_disk_answer_the_same(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = ("train.compute=bfloat16", "train.score_every_steps=6")
    resident = run(scored(place, *settings), tmp_path / "resident")
    streamed = run(
        scored(place, *settings, "train.resident_layers=0"), tmp_path / "streamed", say=said.append
    )  # fmt: skip
    assert streamed.digest == resident.digest
    assert streamed.scores[-1].scores == resident.scores[-1].scores
    assert any("scores are slow to come" in line for line in said)


def test_queries_are_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "numbers.sqlite"
    with sqlite3.connect(database) as opened:
        opened.execute("create table numbers (value integer)")
        opened.executemany("insert into numbers values (?)", [(n,) for n in range(10)])
    opened.close()
    for name, first in (("train", 0), ("held", 5)):
        lines = [
            {"messages": [{"role": "user", "content": f"Above {n}?"},
                          {"role": "assistant", "content": f"select value from numbers where value > {n}"}]}
            for n in range(first, first + 4)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(
        place, f"data.train={tmp_path / 'train.jsonl'}", f"data.validation={tmp_path / 'held.jsonl'}",
        "evaluate.task=sql", f"evaluate.database={database}", "train.score_every_steps=6", "train.score_samples=3",
    )  # fmt: skip
    answers = iter(["select value from numbers where value > 5", "select 77", "no query"])
    monkeypatch.setattr(task_evaluation, "extract_sql", lambda text: next(answers))
    found = run(config, tmp_path / "run").scores[-1]
    assert (found.score_of, found.score, found.score_samples) == ("execution_accuracy", 1 / 3, 3)
    lines = (tmp_path / "held.jsonl").read_text().replace("numbers where", "nothing where")
    (tmp_path / "held.jsonl").write_text(lines)
    with pytest.raises(InputError, match=r"no query that runs on numbers\.sqlite"):
        prepare_run(config)


SCORES = {1: 0.1, 2: 0.4, 3: 0.5, 4: 0.5, 5: 0.45, 6: 0.55}


def scripted(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> None:
    found = iter(scores.values())

    def measured(self: Scorer, model: object) -> dict[str, Any]:
        value = next(found)
        return {"score": value, "score_of": "execution_accuracy", "score_low": 0.0, "score_high": 1.0,
                "scores": {"execution_accuracy": value}, "score_samples": 4, "unfinished": 0,
                "score_seconds": 0.1}  # fmt: skip

    monkeypatch.setattr(Scorer, "_measured", measured)


def test_the_best_score_ends_the_run_and_is_its_result(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best is at step 3; a score that is the same is no better. Counted across a stop."""
    said: list[str] = []
    settings = [
        "train.score_every_steps=1", "train.best_by=score", "train.early_stopping_patience=2",
        "train.restore_best=true", "train.save_every_steps=1", "train.keep_checkpoints=9",
    ]  # fmt: skip
    scripted(monkeypatch, SCORES)
    stopped = run(scored(place, *settings), tmp_path / "run", say=said.append)
    assert [step for step, _ in stopped.losses] == [1, 2, 3, 4, 5]
    assert any("stopped early: 2 scores in a row" in line and "0.5000 after step 3" in line for line in said)
    assert any("the model after step 3, whose score was the best" in line for line in said)
    assert best_step(tmp_path / "run" / "best") == 3
    from safetensors.torch import load_file

    best = load_file(tmp_path / "run" / "best" / "tensors.safetensors")
    there = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "tensors.safetensors")
    assert best
    assert all(torch.equal(value, there[name]) for name, value in best.items())
    scripted(monkeypatch, SCORES)
    with pytest.raises(Interrupted):
        run(scored(place, *settings), tmp_path / "parts", watch=stop_after(4))
    scripted(monkeypatch, {5: SCORES[5]})
    assert [step for step, _ in run(scored(place, *settings), tmp_path / "parts", resume=True).losses] == [5]
    assert adapter_bits(tmp_path / "parts") == adapter_bits(tmp_path / "run")


def test_what_decides_may_not_change_and_what_does_not_may(place: Path, tmp_path: Path) -> None:
    for name, more, refused in (
        ("free", [], False),
        ("bound", ["train.best_by=score", "train.restore_best=true"], True),
    ):
        with pytest.raises(Interrupted):
            run(scored(place, *more), tmp_path / name, watch=stop_after(3))
        other = scored(place, *more, "train.score_samples=2")
        if refused:
            with pytest.raises(InputError, match=r"train\.score_samples was 4 and is 2"):
                run(other, tmp_path / name, resume=True)
        else:
            assert run(other, tmp_path / name, resume=True).scores[-1].score_samples == 2


class Second(Ranks):
    """The second of two processes, told what the first one says."""

    rank, count = 1, 2

    def __init__(self, says: str) -> None:
        self.says = says

    def told(self, text: str) -> str:
        assert text == ""
        return self.says


def test_of_several_processes_the_first_answers_and_all_have_its_score(
    place: Path, dropping: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scored(place)
    prepared = prepare_run(config)
    assert prepared.questions is not None
    said: list[str] = []

    class First(Ranks):
        count = 2

        def told(self, text: str) -> str:
            said.append(text)
            return text

    one = Scorer(config, prepared.source, prepared.questions, First()).score(dropping.model, 6)
    monkeypatch.setattr(scoring, "evaluate_task", lambda *_, **__: pytest.fail("the second one answered"))
    other = Scorer(config, prepared.source, prepared.questions, Second(said[0])).score(dropping.model, 6)
    assert other == one

    def fails(*_: object, **__: object) -> None:
        raise FituneError("NaN")

    monkeypatch.setattr(scoring, "evaluate_task", fails)
    with pytest.raises(FituneError, match="after step 6 cannot be scored: NaN"):
        Scorer(config, prepared.source, prepared.questions, First()).score(dropping.model, 6)
    with pytest.raises(FituneError, match="after step 6 cannot be scored: NaN"):
        Scorer(config, prepared.source, prepared.questions, Second(said[-1])).score(dropping.model, 6)


def test_pairs_are_scored_by_the_better_answer_and_bad_ones_left_out(place: Path, tmp_path: Path) -> None:
    for name, first in (("train", 0), ("held", 100)):
        lines = [
            {"messages": [{"role": "user", "content": f"After {n}"}, {"role": "assistant", "content": str(n + good)}],
             "label": bool(good)}
            for n in range(first, first + 6)
            for good in (0, 1)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(
        place, f"data.train={tmp_path / 'train.jsonl'}", f"data.validation={tmp_path / 'held.jsonl'}",
        "train.objective=kto", "train.score_every_steps=6", "train.score_samples=4", "data.pack=false",
    )  # fmt: skip
    questions = prepare_run(config).questions
    assert questions is not None
    assert [sample.messages[-1].content for sample in questions.samples] == ["101", "102", "103", "104"]


def test_the_plan_has_room_for_the_answers(place: Path) -> None:
    few, many, none = (
        plan_run(prepare_run(config), with_time=False)
        for config in (
            scored(place, "train.micro_batch=1"),
            scored(place, "train.micro_batch=1", "evaluate.batch=64", "train.score_samples=5",
                   "evaluate.max_new_tokens=400"),
            unscored(scored(place)),
        )
    )  # fmt: skip

    def held(plan: Any) -> int:
        return int(next((item.value for item in plan.settings if item.name == "answers hold"), 0))

    assert 0 == held(none) < held(few) < held(many)
    assert sum(int(item.value) for item in many.memory) == many.peak_bytes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.validation=null"], "there are no questions to answer"),
        (["evaluate.task=perplexity"], "perplexity is the validation loss"),
        (["train.score_every_steps=null"], "has no effect without train.score_every_steps"),
        (["train.score_every_steps=null", "train.score_samples=50", "train.best_by=score"],
         "score needs scores"),
        (["train.best_by=score"], "has no effect without train.early_stopping_patience"),
        (["train.restore_best=true"], "needs validations on the way"),
        (["evaluate.max_new_tokens=500"], "outgrows the model's 512 positions"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(place: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said.replace(".", r"\.")):
        prepare_run(scored(place, *overrides))


def test_plain_text_has_no_questions(place: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"Page {n}."}) + "\n" for n in range(4)))
    with pytest.raises(InputError, match="hold no questions with answers"):
        prepare_run(scored(place, f"data.validation={tmp_path / 'text.jsonl'}"))
