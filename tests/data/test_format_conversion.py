"""What is written in a format is read back as the same samples, whatever the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitune.data.conversation import Message, Sample, ToolCall
from fitune.data.fields import RecordError
from fitune.data.format_conversion import convert_file
from fitune.data.formats import FORMATS
from fitune.data.reading import read_samples, read_with_format
from fitune.data.record_writing import record_of, write_records
from fitune.errors import InputError

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), min_size=1, max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS, lambda x: st.lists(x, max_size=3), max_leaves=4
)
CALLS = st.builds(ToolCall, WORDS, st.dictionaries(WORDS, JSON, max_size=3), st.just("") | WORDS)


@st.composite
def conversations(draw: Any) -> tuple[Message, ...]:
    turns = [Message("system", draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(WORDS)))
        if draw(st.booleans()):
            calls = tuple(draw(st.lists(CALLS, min_size=1, max_size=2)))
            turns.append(Message("assistant", "", draw(st.sampled_from([None, True, False])), calls))
            turns.append(
                Message("tool", draw(WORDS), name=draw(st.just("") | WORDS), call_id=draw(st.just("") | WORDS))
            )
        turns.append(Message("assistant", draw(WORDS), draw(st.sampled_from([None, True, False]))))
    return tuple(turns)


TOOLS = st.lists(
    st.builds(lambda name: {"type": "function", "function": {"name": name, "parameters": {}}}, WORDS), max_size=2
).map(tuple)


@st.composite
def samples(draw: Any) -> Sample:
    kind = draw(st.sampled_from(["text", "plain", "chat", "preference", "kto"]))
    extra = {"id": draw(WORDS)} if draw(st.booleans()) else {}
    if kind == "text":
        return Sample(text=draw(WORDS), extra=extra)
    if kind == "plain":
        pairs = draw(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
        turns = [m for q, a in pairs for m in (Message("user", q), Message("assistant", a))]
        system = [Message("system", draw(WORDS))] if draw(st.booleans()) else []
        return Sample((*system, *turns), extra=extra)
    messages, tools = draw(conversations()), draw(TOOLS)
    if kind == "kto":
        return Sample(messages, tools=tools, label=draw(st.booleans()), extra=extra)
    if kind == "preference":
        better, worse = draw(st.lists(WORDS, min_size=2, max_size=2, unique=True))
        asked = (*messages, Message("user", "?"))
        return Sample(
            (*asked, Message("assistant", better)), tools=tools, rejected=(*asked, Message("assistant", worse)),
            extra=extra,
        )  # fmt: skip
    return Sample(messages, tools=tools, extra=extra)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    given=st.lists(samples(), min_size=1, max_size=3),
    format=st.sampled_from(sorted(FORMATS)),
    json_list=st.booleans(),
)
def test_nothing_of_a_sample_is_lost(tmp_path: Path, given: list[Sample], format: str, json_list: bool) -> None:
    kept, records = [], []
    for sample in given:
        try:
            records.append(record_of(sample, format))
        except RecordError:
            continue  # it has no place there, and that was said
        kept.append(sample)
    if not kept:
        return
    path = tmp_path / ("a.json" if json_list else "a.jsonl")
    assert write_records(path, records) == len(kept)
    found, _ = read_with_format(path, format)
    assert [replace(sample, origin=None, extra=dict(sample.extra)) for sample in found] == kept


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".csv.zst", ".parquet"])
def test_question_answer_to_alpaca_without_code(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("pyarrow")
    source = tmp_path / "qa.jsonl"
    source.write_text(
        "\n".join(json.dumps({"q": f"ü {n}?", "a": f'"{n}", ja\nnein', "id": f"{n}"}) for n in range(20)),
        encoding="utf-8",
    )
    target = tmp_path / f"alpaca{suffix}"
    done = convert_file(source, target, "alpaca", columns={"q": "instruction", "a": "output"})
    assert (done.found, done.format, done.samples) == ("alpaca", "alpaca", 20)
    found, format = read_with_format(target)
    assert format == "alpaca"
    assert found[3].messages == (Message("user", "ü 3?"), Message("assistant", '"3", ja\nnein'))
    assert found[3].extra == {"id": "3"}
    with pytest.raises(InputError, match="there is such a file already"):
        convert_file(source, target, "alpaca", columns={"q": "instruction", "a": "output"})


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    long = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    source.write_text(f"{json.dumps({'instruction': 'a', 'output': 'b'})}\n{json.dumps(long)}", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: 2 exchanges, and the format question_answer has one"):
        convert_file(source, target, "question_answer")
    assert not target.exists()
    assert list(tmp_path.iterdir()) == [source]
    with pytest.raises(InputError, match="line 1: the format kto needs a label"):
        convert_file(source, target, "kto")
    with pytest.raises(InputError, match=r"cannot write a file of the kind \.xlsx"):
        convert_file(source, tmp_path / "b.xlsx", "alpaca")
    with pytest.raises(InputError, match="there is no folder"):
        convert_file(source, tmp_path / "none" / "b.jsonl", "alpaca")
    with pytest.raises(InputError, match="record 2 has the keys"):
        convert_file(source, tmp_path / "b.csv", "alpaca")


def test_numbers_that_json_does_not_have_are_named(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a", "score": 1}\n{"text": "b", "score": 1e999}', encoding="utf-8")
    with pytest.raises(InputError, match="record 2 holds what JSON does not have"):
        convert_file(source, tmp_path / "b.jsonl", "text")
    assert list(tmp_path.iterdir()) == [source]


def test_two_files_of_lines_become_pairs(tmp_path: Path) -> None:
    german, english = tmp_path / "a.de", tmp_path / "a.en"
    german, english = german.with_suffix(".de.txt"), english.with_suffix(".en.txt")
    german.write_text("Eins\nZwei \n", encoding="utf-8")
    english.write_text("One\nTwo\n", encoding="utf-8")
    target = tmp_path / "pairs.jsonl"
    done = convert_file(german, target, "messages", instruction="Translate into English.", answers=english)
    assert done.samples == 2
    assert read_samples(target)[1].messages == (
        Message("user", "Translate into English.\nZwei"),
        Message("assistant", "Two"),
    )
    target.unlink()
    english.write_text("One\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2: only .*a\.de\.txt goes on"):
        convert_file(german, target, "messages", answers=english)
    english.write_text("One\n\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: a line without its partner: the answer is empty"):
        convert_file(german, target, "messages", answers=english)
    english.write_bytes(b"One\n\xff\n")
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        convert_file(german, target, "messages", answers=english)


def test_the_real_files_go_through_messages_and_back(tmp_path: Path, shared_data: Path) -> None:
    for name, format in (
        ("alpaca_en_demo.json", "alpaca"), ("alpaca_zh_demo.json", "alpaca"), ("dpo_en_demo.json", "preference"),
        ("kto_en_demo.json", "kto"), ("c4_demo.jsonl", "text"), ("glaive_toolcall_en_demo.json", "sharegpt"),
    ):  # fmt: skip
        source = shared_data / "llamafactory_demo" / name
        before, found = read_with_format(source)
        assert found == format
        target = tmp_path / f"{name}.jsonl.gz"
        convert_file(source, target, "messages" if format in ("alpaca", "sharegpt") else format)
        after = read_samples(target)
        assert [replace(sample, origin=None) for sample in after] == [
            replace(sample, origin=None) for sample in before
        ]
