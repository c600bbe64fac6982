from __future__ import annotations

import copy
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fitune.data import load_training_data
from fitune.data.dataset import original_samples
from fitune.data.report import length_histogram
from fitune.data.split import split_share
from fitune.errors import InputError


@dataclass
class Source:
    path: str
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    instruction: str | None = None
    weight: float = 1.0
    share: float | None = None


@dataclass
class Settings:
    train: list[Source]
    validation: str | float | None = None
    system: str | None = None
    chat_template: str = "model"
    train_on: Any = "assistant"
    max_tokens: int = 1024
    over_length: Any = "error"
    missing_end_tokens: str = "error"
    replay: str | None = None
    replay_share: float = 0.1
    mix_temperature: float = 1.0


def questions(path: Path, count: int, first: int = 0) -> Path:
    records = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(first, first + count)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def test_real_alpaca_end_to_end(shared_data: Path, smollm2_tokenizer: Any) -> None:
    path = shared_data / "llamafactory_demo" / "alpaca_en_demo.json"
    data = load_training_data(Settings([Source(str(path))], validation=0.05), smollm2_tokenizer, seed=1)
    report = data.report
    assert (report.samples, report.cut, report.dropped, report.nothing_to_train) == (999, 0, 0, 0)
    assert len(data.train) + len(data.validation) == 999
    assert abs(len(data.validation) - 50) <= 1
    end = smollm2_tokenizer.eos_token_id
    for sample in [*data.train, *data.validation]:
        trained = [token for token, flag in zip(sample.tokens, sample.trained, strict=True) if flag]
        assert trained[-1] == end
        assert trained.count(end) == 1
        assert not any(sample.trained[: sample.trained.index(True)])
    assert not {sample.tokens for sample in data.train} & {sample.tokens for sample in data.validation}
    assert report.tokens == sum(map(len, [*data.train, *data.validation]))
    assert sum(count for _, count in report.lengths) == 999
    assert json.loads(json.dumps(report.as_json()))["trained_tokens"] == report.trained_tokens
    again = load_training_data(Settings([Source(str(path))], validation=0.05), smollm2_tokenizer, seed=1)
    assert again == data
    other = load_training_data(Settings([Source(str(path))], validation=0.05), smollm2_tokenizer, seed=2)
    assert other.validation != data.validation


def test_chat_without_a_template_is_refused(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    base = copy.deepcopy(smollm2_tokenizer)
    base.chat_template = None
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "It is 1."}]
    chat.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    with pytest.raises(InputError, match=r"chat\.jsonl: a chat .*chat_template\.jinja.*instruction"):
        load_training_data(Settings([Source(str(chat))]), base)
    written = load_training_data(Settings([Source(str(chat))], chat_template="instruction"), base)
    assert "### Response:\nIt is 1." in base.decode(written.train[0].tokens)
    assert written.report.has_default_template
    # An instruction is no chat: any wording may ask it, and the report says which one does.
    asked = load_training_data(Settings([Source(str(questions(tmp_path / "a.jsonl", 2)))]), base)
    assert asked.report.has_default_template
    with pytest.raises(InputError, match="this one has its own"):
        load_training_data(Settings([Source(str(chat))], chat_template="instruction"), smollm2_tokenizer)


def test_report_shows_what_is_trained(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = questions(tmp_path / "a.jsonl", 3)
    report = load_training_data(Settings([Source(str(path))]), smollm2_tokenizer).report
    view = report.views[0]
    assert [piece.text for piece in view.pieces if piece.is_trained] == ["It is 0.<|im_end|>"]
    console = Console(file=io.StringIO(), width=200)
    console.print(report.as_rich())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "⟦It is 0.<|im_end|>⟧" in shown
    assert "3 samples, format question_answer" in shown


def test_duplicates_are_listed_and_never_straddle(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = questions(tmp_path / "a.jsonl", 40)
    path.write_text((path.read_text() + "\n") * 3, encoding="utf-8")
    data = load_training_data(Settings([Source(str(path))], validation=0.2), smollm2_tokenizer)
    assert data.report.duplicates == 80
    assert data.report.problems[0].message == f"the same sample as {path} line 1"
    assert data.report.problems[0].line == 41
    assert len(data.validation) == 24
    assert not {s.tokens for s in data.train} & {s.tokens for s in data.validation}


def test_what_is_not_listed_is_counted(
    tmp_path: Path, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tally", "dataset"):
        monkeypatch.setattr(f"fitune.data.{module}.KEPT_NOTES", 10)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, path in enumerate(files):  # 8 and 14 empty answers, no sample twice
        lines = [{"question": f"{number} {n}", "answer": ""} for n in range(8 + 6 * number)]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    report = load_training_data(Settings([Source(str(path)) for path in files]), smollm2_tokenizer).report
    assert (report.empty, len(report.problems), report.more_problems) == (22, 10, 12)


def test_split_share() -> None:
    groups = np.array([7, 7, 2, 2, 3, 3, 0, 0, 9, 9])
    train, held_out = split_share(groups, 0.2, seed=0)
    assert sorted([*train, *held_out]) == list(range(10))
    assert len(held_out) == 2
    assert len(set(groups[held_out])) == 1
    assert np.array_equal(split_share(groups, 0.2, seed=0)[1], held_out)
    assert {tuple(split_share(groups, 0.2, seed=seed)[1]) for seed in range(20)} > {tuple(held_out)}
    with pytest.raises(InputError, match="too few"):
        split_share(np.array([4, 4]), 0.5, seed=0)


def test_a_list_on_one_line_is_split_and_found_again(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = tmp_path / "a.json"  # as json.dump writes it: every sample begins on line 1
    path.write_text(json.dumps([{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(50)]))
    data = load_training_data(Settings([Source(str(path))], validation=0.2), smollm2_tokenizer)
    assert (len(data.train), len(data.validation)) == (40, 10)
    found = [sample.messages[1].content for sample in original_samples(data, data.validation)]
    held_out = [
        smollm2_tokenizer.decode([t for t, on in zip(s.tokens, s.trained, strict=True) if on])
        for s in data.validation
    ]
    assert [f"{answer}<|im_end|>" for answer in found] == [text.strip() for text in held_out]


def test_validation_files(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    train, valid = questions(tmp_path / "a.jsonl", 10), questions(tmp_path / "b.jsonl", 4, first=8)
    data = load_training_data(Settings([Source(str(train))], validation=str(valid)), smollm2_tokenizer)
    assert (len(data.train), len(data.validation), data.report.leaked) == (10, 4, 2)
    assert {(item.file, item.line) for item in data.report.problems} == {(str(valid), 1), (str(valid), 2)}
    with pytest.raises(InputError, match=r"same file as data.train\[0\]"):
        load_training_data(Settings([Source(str(train))], validation=str(train)), smollm2_tokenizer)
    copied = questions(tmp_path / "c.jsonl", 10)
    with pytest.raises(InputError, match="every validation sample is also a training sample"):
        load_training_data(Settings([Source(str(train))], validation=str(copied)), smollm2_tokenizer)


def test_weights_repeat_and_thin_out(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    one, two = questions(tmp_path / "a.jsonl", 10), questions(tmp_path / "b.jsonl", 10, first=10)
    sources = [Source(str(one), weight=2.5), Source(str(two), weight=0.3)]
    data = load_training_data(Settings(sources), smollm2_tokenizer)
    counts = Counter(sample.origin for sample in data.train)
    assert sorted(counts[origin] for origin in counts if origin and origin.path == str(one)) == [2] * 5 + [3] * 5
    assert [counts[origin] for origin in counts if origin and origin.path == str(two)] == [1] * 3
    assert (data.report.samples, data.report.train_samples) == (20, 28)


def test_system_and_train_on_reach_the_samples(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = questions(tmp_path / "a.jsonl", 2)
    data = load_training_data(Settings([Source(str(path))], system="Short.", train_on="all"), smollm2_tokenizer)
    assert smollm2_tokenizer.decode(list(data.train[0].tokens)).startswith("<|im_start|>system\nShort.<|im_end|>")
    assert data.report.trained_tokens == data.report.tokens - 2


def test_it_fails_closed(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = questions(tmp_path / "a.jsonl", 30)
    with pytest.raises(InputError, match=r"a.jsonl line 1: .* tokens, but a row holds 16") as caught:
        load_training_data(Settings([Source(str(path))], max_tokens=16), smollm2_tokenizer)
    assert caught.value.problems[-1] == "and 10 more samples"
    with pytest.raises(InputError, match="30 were dropped for their length; 0 are left"):
        load_training_data(Settings([Source(str(path))], max_tokens=16, over_length="drop"), smollm2_tokenizer)
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 2, encoding="utf-8")
    with pytest.raises(InputError, match="2 of 2 samples have no token to train") as caught:
        load_training_data(Settings([Source(str(asked))]), smollm2_tokenizer)
    assert "asked.jsonl line 2: no token of it would be trained" in str(caught.value)
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(InputError, match="in 30 of 30 samples a trained answer has no end-of-turn token"):
        load_training_data(Settings([Source(str(path))]), tokenizer)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_training_data(Settings([Source(str(bad)), Source(str(tmp_path / "none.json"))]), smollm2_tokenizer)
    assert len(caught.value.problems) == 2


def test_a_few_samples_without_trained_tokens_are_left_out_and_listed(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    turns = [
        [{"role": "user", "content": str(n)}, {"role": "assistant", "content": ["", "x"][n > 0]}] for n in range(120)
    ]
    turns[7].pop()
    path.write_text("\n".join(json.dumps({"messages": one}) for one in turns), encoding="utf-8")
    report = load_training_data(Settings([Source(str(path))]), smollm2_tokenizer).report
    assert (report.nothing_to_train, report.empty, report.train_samples) == (1, 1, 119)
    assert {(item.line, item.message) for item in report.problems} == {
        (1, "an answer is empty"),
        (8, "no token of it would be trained; left out"),
    }


def test_control_tokens_in_the_data_are_counted_and_listed(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = questions(tmp_path / "a.jsonl", 3)
    forged = json.dumps({"question": "a<|im_end|>b", "answer": "Blue <|im_start|>system<|im_end|>"})
    path.write_text(path.read_text() + "\n" + forged, encoding="utf-8")
    report = load_training_data(Settings([Source(str(path))]), smollm2_tokenizer).report
    assert report.control_tokens_in_text == 3
    assert [(item.line, item.message) for item in report.problems] == [
        (4, "its text holds control tokens (3), which are encoded as plain text")
    ]


def test_dropped_samples_are_listed(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = questions(tmp_path / "a.jsonl", 3)
    long = json.dumps({"question": "long " * 200, "answer": "x"})
    path.write_text(path.read_text() + "\n" + long, encoding="utf-8")
    report = load_training_data(
        Settings([Source(str(path))], max_tokens=100, over_length="drop"), smollm2_tokenizer
    ).report
    assert (report.samples, report.dropped, report.train_samples) == (4, 1, 3)
    assert report.problems[0].line == 4
    assert "dropped" in report.problems[0].message


def test_length_histogram() -> None:
    assert length_histogram([3, 16, 17, 200]) == ((16, 2), (32, 1), (64, 0), (128, 0), (256, 1))
    assert length_histogram([]) == ()


def test_replay_is_its_share_of_the_epoch(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    task, general = questions(tmp_path / "task.jsonl", 90), questions(tmp_path / "general.jsonl", 40, first=1000)
    data = load_training_data(
        Settings([Source(str(task))], replay=str(general), replay_share=0.25), smollm2_tokenizer, seed=1
    )
    found = Counter(sample.origin.path for sample in data.train if sample.origin)
    assert found == {str(task): 90, str(general): 30}
    assert len({sample.tokens for sample in data.train}) == 120  # none of them twice
    more = load_training_data(
        Settings([Source(str(task)), Source(str(general), share=0.5)]), smollm2_tokenizer, seed=1
    )
    assert Counter(sample.origin.path for sample in more.train if sample.origin) == {str(task): 90, str(general): 90}
    warm = load_training_data(
        Settings([Source(str(task)), Source(str(general))], mix_temperature=100), smollm2_tokenizer, seed=1
    )
    counts = Counter(sample.origin.path for sample in warm.train if sample.origin)
    assert abs(counts[str(task)] - counts[str(general)]) <= 2
    assert sum(counts.values()) in (129, 130, 131)
    with pytest.raises(InputError, match="leaves nothing for the others"):
        load_training_data(
            Settings([Source(str(task)), Source(str(general), share=0.95)], replay=str(general)), smollm2_tokenizer
        )


def test_a_split_document_is_on_one_side(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"{n} " + f"word{n} " * 40 for n in range(30)), encoding="utf-8")
    settings = Settings([Source(str(path))], validation=0.2, max_tokens=32, over_length="split")
    data = load_training_data(settings, smollm2_tokenizer)
    assert data.report.split == data.report.samples == 30
    sides = [{sample.origin for sample in side} for side in (data.train, data.validation)]
    assert not sides[0] & sides[1]
    assert all(sides)


def test_a_missing_file_is_named_before_another_is_read(
    tmp_path: Path, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = questions(tmp_path / "a.jsonl", 3)
    monkeypatch.setattr("fitune.data.dataset.encode_file", lambda *_: pytest.fail("read first"))
    with pytest.raises(InputError, match="no such file"):
        load_training_data(Settings([Source(str(there)), Source(str(tmp_path / "b.jsonl"))]), smollm2_tokenizer)


def test_equal_parts_of_different_texts_are_told_as_leaks(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    same = " the same end" * 60
    path = tmp_path / "a.jsonl"
    texts = [" ".join(f"{n}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" * 2) for n in range(6)]
    path.write_text("\n".join(json.dumps({"text": text + same}) for text in texts), encoding="utf-8")
    settings = Settings([Source(str(path))], validation=0.3, max_tokens=32, over_length="split")
    data = load_training_data(settings, smollm2_tokenizer)
    trained = {(sample.tokens, sample.trained) for sample in data.train}
    leaked = sum((sample.tokens, sample.trained) in trained for sample in data.validation)
    assert data.report.leaked == leaked > 0
    assert sum("also trained on" in problem.message for problem in data.report.problems) == leaked
