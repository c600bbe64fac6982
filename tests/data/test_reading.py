from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitune.data import Message, detect_format, read_samples
from fitune.data.conversation import ToolCall
from fitune.data.record import SHOWN_PROBLEMS
from fitune.errors import InputError

ALPACA = {"instruction": "add", "input": "1 2", "output": "3"}


def write(path: Path, records: list[Any], lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=2)
    path.write_text(text, encoding="utf-8")
    return path


def turns(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def pairs(path: Path, **options: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in read_samples(path, **options)[0].messages]


FORMATS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "alpaca": (
        {**ALPACA, "system": "s", "history": [["q", "a"]]},
        [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "add\n1 2"), ("assistant", "3")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        [("system", "s"), ("user", "q"), ("assistant", "a")],
    ),
    "messages": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        [("user", "q"), ("assistant", "a")],
    ),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, [("user", "q"), ("assistant", "a")]),
    "question_answer": ({"question": "q", "answer": "a", "database": "d"}, [("user", "q"), ("assistant", "a")]),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_formats_are_recognised_and_converted(tmp_path: Path, name: str, suffix: str) -> None:
    record, expected = FORMATS[name]
    path = write(tmp_path / f"data{suffix}", [record, record], lines=suffix == ".jsonl")
    assert detect_format(path) == name
    assert pairs(path) == pairs(path, format=name) == expected


def test_text_records_and_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two", "id": 7}], lines=True)
    assert [(sample.text, dict(sample.extra)) for sample in read_samples(path)] == [("one", {}), ("two", {"id": 7})]
    path = tmp_path / "b.txt"
    path.write_text("first\nstill first\n\n\nsecond\n", encoding="utf-8")
    assert [(s.text, s.origin and s.origin.line) for s in read_samples(path)] == [
        ("first\nstill first", 1),
        ("second", 5),
    ]
    path.write_text("\none\ntwo\n", encoding="utf-8")
    assert [(s.text, s.origin and s.origin.line) for s in read_samples(path)] == [("one", 2), ("two", 3)]


def test_columns_rename_and_extra_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"q": "Q", "a": "A", "database": "d"}])
    sample = read_samples(path, columns={"q": "instruction", "a": "output"})[0]
    assert sample.messages == (Message("user", "Q"), Message("assistant", "A"))
    assert sample.extra == {"database": "d"}
    with pytest.raises(InputError, match=r"no known field 'outpt'.*known: answer, chosen, completion"):
        read_samples(path, columns={"q": "instruction", "a": "outpt"})
    with pytest.raises(InputError, match=r"line 2: 'x' of `columns` is missing \(keys found: q, a, database\)"):
        read_samples(path, columns={"x": "instruction"})
    with pytest.raises(InputError, match="two keys are mapped to 'output'"):
        read_samples(path, columns={"q": "output", "a": "output"})
    path = write(tmp_path / "b.json", [{"question": "Q", "answer": "A"}])
    assert pairs(path, columns={"question": "instruction", "answer": "output"}) == [("user", "Q"), ("assistant", "A")]


def test_lines_of_a_list_are_those_of_its_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf\n[ {"text": "a\\nb"},\r\n\r\n  {"text":\n "c"}, {"text": "d"}\n]\n')
    assert [sample.origin and sample.origin.line for sample in read_samples(path)] == [2, 4, 5]


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ALPACA).encode()))
    assert len(read_samples(path)) == 1
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="cut short or damaged"):
        read_samples(path)
    path.write_bytes(b"plain")
    with pytest.raises(InputError, match="not gzip"):
        read_samples(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "the file is empty"),
        ("a.json", b" \n ", "the file is empty"),
        ("a.json", b"[]", "the list is empty"),
        ("a.json", b'[\n{"text": "a"},\n{"text": "b"', "line 3: the sample that starts here is broken"),
        ("a.json", b'[\n{"text": "a"}\n', "line 3: the file ends inside the list"),
        ("a.json", b'[\n{"text": "a"},\n]', "line 3: a comma before the closing bracket"),
        ("a.json", b'[\n{"text": "a"}\n{"text": "b"}]', "line 3: expected a comma"),
        ("a.json", b'[{"text": "a"}]\nx', "line 2: text after the end of the list"),
        ("a.json", b'{\n"text": "a"}', "one JSON object"),
        ("a.json", b'[{"text": "a", "text": "b"}]', "line 1: the key 'text' occurs twice"),
        ("a.json", b'[\n"text", 7]', "a sample must be an object, found text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "a"} {"text": "b"}', "line 1: text after the end"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: not UTF-8 .byte ff"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "\xc3("}', "line 3: not UTF-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: .text. holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
        ("a.jsonl", b'{"text": 7}', 'line 1: "text" must be text, found a number'),
        ("a.jsonl", b'{"text": ""}', 'line 1: "text" is empty'),
        ("a.xlsx", b"x", "unknown kind of data file .xlsx; known: .json"),
        ("a.parquet.gz", b"x", "unknown kind of data file .parquet.gz"),
        (
            "a.json",
            b'[{"instruction": "a", "answer": "b"}]',
            r"fit no known format \(keys found: instruction, answer\)",
        ),
        (
            "a.json",
            b'[{"instruction": "a", "output": "b", "text": "c"}]',
            "fit several formats: alpaca, text",
        ),
        (
            "a.json",
            b'[{"text": "a"},\n{"prompt": "a", "completion": "b"}]',
            "line 2: this sample has the format prompt",
        ),
        ("a.json", b'[{"chosen": "b", "rejected": "c"}]', "share no question, and there is none beside them"),
        ("a.json", b'[{"prompt": "a", "chosen": "b", "rejected": "b"}]', "are the same"),
        ("a.json", b'[{"prompt": "a", "chosen": {"role": "user", "content": "b"}, "rejected": "b"}]', "an answer of"),
        ("a.json", b'[{"messages": [{"role": "user", "content": "b"}], "label": true}]', "must be the assistant's"),
        ("a.json", b'[{"instruction": "", "output": "b"}]', "both empty"),
        ("a.json", b'[{"instruction": "a", "output": null}]', '"output" must be text, found null'),
        ("a.json", b'[{"messages": []}]', "must be a list of turns, found an empty list"),
        ("a.json", b'[{"messages": [{"role": "boss", "content": "x"}]}]', "unknown role 'boss'; known: system"),
        ("a.json", b'[{"messages": [{"role": "user"}]}]', 'turn 1 needs "role" and "content"'),
        (
            "a.json",
            b'[{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}]',
            "has a call without",
        ),
        (
            "a.json",
            b'[{"messages": [{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}]}]',
            "only the assi",
        ),
        ("a.json", b'[{"conversations": [{"from": "function_call", "value": "f(1)"}]}]', "text must be JSON"),
        (
            "a.json",
            b'[{"messages": [{"role": "user", "content": "", "name": "Bo"}]}]',
            "keys that would be lost: name",
        ),
        ("a.json", b'[{"messages": [{"role": "user", "content": "", "weight": 1}]}]', "only turns of the assistant"),
        ("a.json", b'[{"conversations": [{"from": "gpt", "value": "a"}], "tools": "x"}]', '"tools" must be JSON'),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_samples(path)
    assert str(path) in str(caught.value)


def test_all_broken_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{", '{"text": "a"}'] * 30), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_samples(path)
    assert len(caught.value.problems) == SHOWN_PROBLEMS + 1
    assert caught.value.problems[1].startswith("line 3: ")
    assert caught.value.problems[-1] == "and 10 more"


def test_missing_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "train.json", [ALPACA])
    with pytest.raises(InputError, match=r"no such file; did you mean .*train\.json"):
        read_samples(tmp_path / "trian.json")
    with pytest.raises(InputError, match="this is a folder"):
        read_samples(tmp_path)
    with pytest.raises(InputError, match=r"no such format 'alpacca'.*known: auto, alpaca"):
        read_samples(tmp_path / "train.json", format="alpacca")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    ["instruction", "output", "input", "history", "messages", "conversations", "text", "system", "prompt"]
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    records=st.lists(st.dictionaries(keys, json_values, max_size=4), min_size=1, max_size=3),
    place=st.integers(0, 400),
    byte=st.integers(0, 255),
    end=st.integers(0, 400),
    lines=st.booleans(),
)
def test_mutated_files_give_samples_or_an_explanation(
    tmp_path: Path, records: list[Any], place: int, byte: int, end: int, lines: bool
) -> None:
    path = write(tmp_path / ("a.jsonl" if lines else "a.json"), records, lines)
    content = bytearray(path.read_bytes())
    content[place : place + 1] = bytes([byte])
    path.write_bytes(bytes(content[:end]) if end < 200 else bytes(content))
    samples = []
    with contextlib.suppress(InputError):  # its message is the explanation; any other error fails the test
        samples = read_samples(path)
    assert all(sample.origin and sample.origin.line >= 1 for sample in samples)


@pytest.mark.parametrize(
    ("name", "format", "count", "last_line"),
    [
        ("alpaca_en_demo.json", "alpaca", 999, 4992),
        ("alpaca_zh_demo.json", "alpaca", 1000, 4997),
        ("identity.json", "alpaca", 91, 452),
        ("c4_demo.jsonl", "text", 300, 300),
        ("wiki_demo.txt", "text", 30, 30),
    ],
)
def test_real_files(shared_data: Path, name: str, format: str, count: int, last_line: int) -> None:
    path = shared_data / "llamafactory_demo" / name
    assert detect_format(path) == format
    samples = read_samples(path)
    assert len(samples) == count
    assert samples[-1].origin is not None
    assert samples[-1].origin.line == last_line


def test_real_preference_pairs(shared_data: Path) -> None:
    path = shared_data / "llamafactory_demo" / "dpo_en_demo.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    samples = read_samples(path)
    assert len(samples) == len(raw) == 300
    for record, sample in zip(raw, samples, strict=True):
        asked = len(record["conversations"])
        assert sample.messages[:asked] == sample.rejected[:asked]
        assert [m.content for m in sample.messages[:asked]] == [turn["value"] for turn in record["conversations"]]
        assert sample.messages[asked:] == (Message("assistant", record["chosen"]["value"]),)
        assert sample.rejected[asked:] == (Message("assistant", record["rejected"]["value"]),)


def test_real_judged_answers(shared_data: Path) -> None:
    path = shared_data / "llamafactory_demo" / "kto_en_demo.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert [sample.label for sample in read_samples(path)] == [record["label"] for record in raw]


def test_real_tool_calls(shared_data: Path) -> None:
    path = shared_data / "llamafactory_demo" / "glaive_toolcall_en_demo.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    samples = read_samples(path)
    for record, sample in zip(raw, samples, strict=True):
        written = [turn for turn in record["conversations"] if turn["from"] == "function_call"]
        calls = [call for message in sample.messages for call in message.tool_calls]
        found = [{"name": call.name, "arguments": call.arguments} for call in calls]
        expected = [json.loads(turn["value"]) for turn in written]
        assert found == [one for turn in expected for one in (turn if isinstance(turn, list) else [turn])]
        assert len(sample.tools) == len(json.loads(record["tools"] or "[]"))
    written = sum(turn["from"] == "function_call" for record in raw for turn in record["conversations"])
    assert sum(bool(message.tool_calls) for sample in samples for message in sample.messages) == written > 200


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": turns("q", "a"), "rejected": turns("q", "b")},
        {"chosen": turns("q", "a"), "rejected": turns("q", "b")},
        {"messages": turns("q"), "chosen": turns("q", "a")[1:], "rejected": turns("q", "b")[1]},
    ],
)
def test_preference_pairs_in_every_style(tmp_path: Path, record: dict[str, Any]) -> None:
    path = write(tmp_path / "a.json", [record])
    assert detect_format(path) == "preference"
    sample = read_samples(path)[0]
    assert sample.messages == (Message("user", "q"), Message("assistant", "a"))
    assert sample.rejected == (Message("user", "q"), Message("assistant", "b"))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": turns("q"), "completion": turns("q", "a")[1:], "label": True},
        {"instruction": "q", "output": "a", "kto_tag": True},
        {"messages": turns("q", "a"), "label": True},
        {"prompt": "q", "completion": "a", "label": "true"},
    ],
)
def test_judged_answers_in_every_style(tmp_path: Path, record: dict[str, Any]) -> None:
    path = write(tmp_path / "a.json", [record])
    assert detect_format(path) == "kto"
    sample = read_samples(path)[0]
    assert (sample.messages, sample.label) == ((Message("user", "q"), Message("assistant", "a")), True)


def test_tool_calls_as_openai_writes_them(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    record = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "7"},
            {"role": "assistant", "content": "It is 7."},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }
    sample = read_samples(write(tmp_path / "a.json", [record]))[0]
    assert sample.messages[1] == Message("assistant", "", tool_calls=(ToolCall("f", {"x": [1]}, "c1"),))
    assert sample.messages[2] == Message("tool", "7", name="f", call_id="c1")
    assert [tool["function"]["name"] for tool in sample.tools] == ["f"]


def test_columns_may_be_paths(tmp_path: Path) -> None:
    record = {"source": ["One.", " Two."], "target": ["first", "second"], "meta": {"n": {"id": "7"}}}
    path = write(tmp_path / "a.json", [record])
    columns = {"source[*]": "input", "target[0]": "output"}
    sample = read_samples(path, columns=columns, instruction="Summarise.")[0]
    assert sample.messages == (Message("user", "Summarise.\nOne. Two."), Message("assistant", "first"))
    assert sample.extra == {"meta": {"n": {"id": "7"}}, "target": ["first", "second"]}
    for wrong, message in (
        ({"target[2]": "output"}, "the list has 2 entries"),
        ({"target.x": "output"}, "there is no 'x' in a list"),
        ({"meta.n[*]": "output"}, "a list is wanted, found an object"),
        ({"nope[0]": "output"}, "of `columns` is missing"),
    ):
        with pytest.raises(InputError, match=message):
            read_samples(path, columns={"source[*]": "input", **wrong}, instruction="Summarise.")
