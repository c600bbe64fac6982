"""`fitune data`: what is shown of data, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call, facts_of

from fitune.cli import encoding_view
from fitune.data import encoded_file
from fitune.data.report import DataReport


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "qa.jsonl", [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(30)])


def test_inspect_tells_everything_in_json(questions: Path) -> None:
    facts = facts_of("data", "inspect", "--no-time", questions, "--validation", "0.1")
    assert facts.keys() >= set(DataReport.__dataclass_fields__) | {"model", "seconds_per_epoch"}
    assert facts["seconds_per_epoch"] is facts["no_time_because"] is None
    assert (facts["samples"], facts["train_samples"], facts["validation_samples"]) == (30, 27, 3)
    assert (facts["end_token_share"], facts["refused"], facts["problems"]) == (1.0, [], [])
    assert [piece["is_trained"] for piece in facts["views"][0]["pieces"]] == [False, True, False]


def test_inspect_estimates_the_time_of_an_epoch_where_it_can(questions: Path, tmp_path: Path) -> None:
    facts = facts_of("data", "inspect", questions)
    assert 0.1 < facts["seconds_per_epoch"] < 600
    run = tmp_path / "run.yaml"
    run.write_text(f"data: {{train: {questions}}}\nlora: {{targets: [no_such_layer]}}\n", encoding="utf-8")
    code, out, _ = call("data", "inspect", run)
    assert code == 0
    assert "could not be estimated: " in out
    assert "no_such_layer" in out


def test_large_files_say_how_far_they_are_and_where_their_tokens_lie(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoded_file, "KEPT_FROM_BYTES", 1)
    monkeypatch.setattr(encoding_view, "LINE_SECONDS", 0.0)
    code, out, err = call("data", "inspect", "--no-time", questions, "--json")
    assert code == 0, err
    assert f"{questions} as tokens: 30 samples" in err
    assert json.loads(out)["kept_in"] == [str(next((tmp_path / "cache" / "tokens").iterdir()).with_suffix(""))]
    code, again, err = call("data", "inspect", "--no-time", questions, "--json")
    assert "as tokens" not in err
    assert again == out


def test_inspect_shows_every_trained_token_and_writes_a_page(questions: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, out, err = call("data", "inspect", "--no-time", questions, "--html", page)
    assert code == 0, err
    assert "⟦It is 0.<|im_end|>⟧" in out
    assert "100.0 % of the samples" in out
    html = page.read_text(encoding="utf-8")
    assert "<mark>It is 0.&lt;|im_end|&gt;</mark>" in html
    assert "<script" not in html


def test_inspect_reads_a_run_file(questions: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"data:\n  train: {questions.name}\n  system: Be brief.\n", encoding="utf-8")
    facts = facts_of("data", "inspect", "--no-time", run)
    assert "Be brief." in facts["views"][0]["pieces"][0]["text"]
    code, _, err = call("data", "inspect", "--no-time", run, questions)
    assert code == 2
    assert "give it alone" in err


def test_rows_longer_than_the_models_positions_are_refused(questions: Path) -> None:
    assert facts_of("data", "inspect", "--no-time", questions, "--max-tokens", "8192")["row_tokens"] == 8192
    code, out, err = call("data", "inspect", "--no-time", questions, "--max-tokens", "8193")
    assert (code, out) == (2, "")
    assert "data.max_tokens: 8193 is more than the 8192 positions of bundled" in " ".join(err.split())


def test_what_cannot_be_trained_on_is_shown_and_exits_with_two(questions: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [{"messages": [{"role": "user", "content": "q"}]}, {"messages": [{"role": "user", "content": "r"}]}],
    )
    code, out, _ = call("data", "inspect", "--no-time", path, "--json")
    facts = json.loads(out)
    assert code == 2
    assert (facts["nothing_to_train"], facts["trained_tokens"]) == (2, 0)
    assert "2 of 2 samples have no token to train" in facts["refused"][0]
    judged = write(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    assert facts_of("data", "inspect", "--no-time", judged)["files"][0]["format"] == "kto"
    code, out, _ = call("data", "inspect", "--no-time", questions, judged, "--json")
    assert code == 2
    assert "answers labelled good or bad" in json.loads(out)["refused"][0]
    long = write(tmp_path / "c.jsonl", [{"question": "q", "answer": "word " * 200}])
    code, out, _ = call("data", "inspect", "--no-time", long, "--max-tokens", "64", "--json")
    assert code == 2
    assert "but a row holds 64" in json.loads(out)["refused"][0]
    assert facts_of("data", "inspect", "--no-time", long, "--max-tokens", "64", "--over-length", "cut")["cut"] == 1


def test_what_looks_wrong_is_counted_and_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"text": "GrÃ¼ÃŸe"}, {"text": "bell \x07"}, {"text": "раypal"}, {"text": "good"}]
    )
    facts = facts_of("data", "inspect", "--no-time", path)
    assert (facts["mojibake"], facts["control_characters"], facts["mixed_scripts"]) == (1, 1, 1)
    assert [problem["line"] for problem in facts["problems"]] == [1, 2, 3]


def test_convert_and_split(questions: Path, tmp_path: Path) -> None:
    target = tmp_path / "alpaca.json"
    facts = facts_of(
        "data", "convert", questions, target, "--to", "alpaca", "--columns", "question=instruction",
        "--columns", "answer=output",
    )  # fmt: skip
    assert (facts["samples"], facts["format"]) == (30, "alpaca")
    assert json.loads(target.read_text(encoding="utf-8"))[0] == {
        "instruction": "What is 0?", "input": "", "output": "It is 0.",
    }  # fmt: skip
    done = facts_of("data", "split", target, tmp_path / "parts", "--validation", "0.1", "--test", "0.2")
    assert done["samples"] == {"train": 21, "validation": 3, "test": 6}
    assert (
        facts_of("data", "inspect", "--no-time", done["files"]["train"], "--validation", done["files"]["test"])[
            "leaked"
        ]
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "none.jsonl", "b.jsonl"], "no such file"),
        (["convert", "{file}", "{file}"], "there is such a file already"),
        (["convert", "{file}", "{out}", "--columns", "question"], "write FOUND=WANTED"),
        (["convert", "{file}", "{out}", "--answers", "{file}", "--columns", "a=output"], "they have no columns"),
        (["split", "{file}", "{folder}", "--validation", "2"], "together below 1"),
        (["split", "{file}", "{folder}", "--validation", "0"], "together below 1"),
        (["inspect", "{file}", "--validation", "0.9"], "data.validation"),
        (["inspect", "{file}", "--validation", "{file}"], "is training data too"),
        (["inspect", "{file}", "--html", "none/report.html"], "there is no folder"),
        (["inspect", "{file}", "--model", "./none"], "none"),
        (["inspect", "hf://models/a"], "is not of the form hf://datasets/OWNER/NAME"),
    ],
)
def test_bad_input_is_explained(questions: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"file": questions, "out": tmp_path / "out.jsonl", "folder": tmp_path / "folder"}
    code, _, err = call("data", *(argument.format(**places) for argument in arguments))
    assert code == 2, err
    assert message in err
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "folder").exists()
