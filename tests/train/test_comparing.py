"""What a run is judged on: the samples that it held out, read as the run reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fitune.config.schema import RunConfig
from fitune.data.conversation import Message
from fitune.data.dataset import load_training_data
from fitune.errors import InputError
from fitune.models.find import find_model
from fitune.train.comparing import evaluation_samples


def records(path: Path, count: int, first: int = 0) -> str:
    lines = [{"frage": f"q{n}", "antwort": f"a{n}", "id": n} for n in range(first, first + count)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


def config_of(train: list[dict[str, Any]], **data: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": train, **data}})


def test_a_validation_file_is_read_as_the_training_files_are(tmp_path: Path) -> None:
    how = {"columns": {"frage": "input", "antwort": "output"}, "instruction": "Say."}
    config = config_of(
        [{"path": records(tmp_path / "a.jsonl", 9), **how}], validation=records(tmp_path / "b.jsonl", 3, 50)
    )
    found = evaluation_samples(config, find_model("bundled"))
    assert [sample.messages[0] for sample in found] == [Message("user", f"Say.\nq{n}") for n in (50, 51, 52)]
    general = tmp_path / "general.jsonl"  # is written as it likes
    general.write_text('{"question": "q", "answer": "a"}', encoding="utf-8")
    config = config.model_copy(update={"data": config.data.model_copy(update={"replay": str(general)})})
    assert evaluation_samples(config, find_model("bundled")) == found


def test_a_share_held_out_is_found_again_with_its_keys(tmp_path: Path) -> None:
    how = {"columns": {"frage": "question", "antwort": "answer"}}
    path = records(tmp_path / "a.jsonl", 30)
    general = tmp_path / "general.jsonl"
    lines = [{"question": f"g{n}", "answer": "x"} for n in range(30)]
    general.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = config_of([{"path": path, **how}, {"path": path, **how}], validation=0.3, replay=str(general))
    source = find_model("bundled")
    held_out = load_training_data(config.data, source.tokenizer(), config.seed).validation
    found = evaluation_samples(config, source)
    assert {str(sample.origin) for sample in found} == {str(sample.origin) for sample in held_out}
    assert len(found) == len({str(sample.origin) for sample in held_out})
    assert any("id" in sample.extra for sample in found)
    with pytest.raises(InputError, match="held out no data"):
        evaluation_samples(config_of([{"path": path, **how}]), source)


def test_of_preferences_only_the_better_answers_are_asked_for(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "q", "chosen": "good", "rejected": "bad"}))
    config = config_of([{"path": records(tmp_path / "a.jsonl", 9)}], validation=str(pairs))
    (found,) = evaluation_samples(config, find_model("bundled"))
    assert (found.messages[-1].content, found.rejected) == ("good", ())
    judged = tmp_path / "judged.jsonl"
    lines = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(6)]
    judged.write_text("\n".join(map(json.dumps, lines)))
    config = config_of([{"path": str(pairs)}], validation=str(judged))
    samples = evaluation_samples(config, find_model("bundled"))
    assert [sample.messages[-1].content for sample in samples] == ["a0", "a2", "a4"]
    assert all(sample.label is None for sample in samples)
    judged.write_text(json.dumps(lines[1]))
    with pytest.raises(InputError, match="all of their answers are labelled bad"):
        evaluation_samples(config, find_model("bundled"))
