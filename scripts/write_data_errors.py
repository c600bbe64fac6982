"""Writes docs/data-errors.md: what is wrong in a data file, and what fitune says of it, by making each mistake.

Run it after changing a message about data: python scripts/write_data_errors.py
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pydantic import ValidationError

from fitune.config.schema import DataSettings, RunConfig
from fitune.data.dataset import load_training_data
from fitune.data.format_conversion import convert_file
from fitune.data.splitting import split_file
from fitune.errors import InputError
from fitune.models.find import find_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data-errors.md"
HEAD = """# What can be wrong with data, and what is said of it

Written by `python scripts/write_data_errors.py`, which makes each of these mistakes and takes down the answer; do not
edit. All end with exit code 2 before anything is trained or written. Up to 20 broken records of a file are named with
their lines (rows, in Parquet and Arrow), then the others are counted.
"""
GOOD = {"question": "q", "answer": "a"}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@dataclass(frozen=True)
class Case:
    """A mistake: what it is called, the file it is made in, and how that is read.

    Attributes:
        settings: of `data`, beside the file.
        files: more of them: name -> content.
        work: what is done instead of reading it for training.
    """

    title: str
    name: str
    content: bytes
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    work: Callable[[Path], object] | None = None
    template: str | None = None


def lines(*records: Any) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


def turn(**changed: Any) -> bytes:
    """A chat whose first turn has these keys."""
    return lines({"messages": [{"role": "user", "content": "q", **changed}, TURNS[1]]})


FILE_CASES = (
    Case("There is no such file", "train.jsonl", b"", work=lambda folder: _train(folder / "trian.jsonl")),
    Case("A folder", "data/train.jsonl", lines(GOOD), work=lambda folder: _train(folder / "data")),
    Case("A kind of file that is not read", "train.xlsx", b"PK"),
    Case("Empty", "train.jsonl", b"\n"),
    Case("An empty list", "train.json", b"[]"),
    Case("UTF-16", "train.jsonl", '{"text": "a"}'.encode("utf-16")),
    Case("Not UTF-8", "train.jsonl", lines(GOOD) + b'\n{"question": "\xfc", "answer": "b"}'),
    Case("Gzip cut short", "train.jsonl.gz", gzip.compress(lines(GOOD), mtime=0)[:-6]),
    Case("Not what its name says", "train.jsonl.gz", lines(GOOD)),
    Case("A compressed file that is none", "train.jsonl.gz", gzip.compress(b"\n" * (300 << 20), mtime=0)),
    Case("A record that is too large", "train.jsonl", b'{"text": "' + b"x" * (65 << 20) + b'"}'),
)
JSON_CASES = (
    Case("A broken line", "train.jsonl", lines(GOOD) + b'\n{"question": "q", "answer": }'),
    Case("More on a line", "train.jsonl", lines(GOOD) + b" " + lines(GOOD)),
    Case("A list cut short", "train.json", b'[\n{"question": "q", "answer": "a"},\n{"question": "q"'),
    Case("A list without its end", "train.json", b'[{"question": "q", "answer": "a"}\n'),
    Case("A comma that is missing", "train.json", b'[{"text": "a"}\n{"text": "b"}]'),
    Case("A comma too many", "train.json", b'[{"text": "a"},\n]'),
    Case("Text behind a list", "train.json", b'[{"text": "a"}]\nx'),
    Case("One object", "train.json", b'{\n"text": "a"\n}'),
    Case("A key twice", "train.jsonl", b'{"text": "a", "text": "b"}'),
    Case("A number that JSON does not have", "train.jsonl", b'{"text": "a", "score": NaN}'),
    Case("Nested too deeply", "train.jsonl", b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    Case("Records that are no objects", "train.jsonl", b'"text"\n[1]'),
    Case("Half a character", "train.jsonl", b'{"text": "\\ud83d"}'),
)
TABLE_CASES = (
    Case("A row with a cell too many", "train.csv", b"question,answer\nq,a\nq,a,b"),
    Case("Two signs that may part the cells", "train.csv", b"question;x,answer\n"),
    Case("A column without a name", "train.csv", b"question,,answer\nq,,a"),
    Case("Two columns of one name", "train.csv", b"question,question\nq,a"),
    Case("A quotation without its end", "train.csv", b'question,answer\nq,"a'),
    Case("Not Parquet", "train.parquet", b"PAR1 and no more"),
    Case("Not Arrow", "train.arrow", b"ARROW1 and no more"),
    Case("A folder of several splits", "saved/dataset_dict.json", b'{"splits": ["train", "test"]}',
         files={"saved/train/state.json": b"{}"}, work=lambda folder: _train(folder / "saved")),
    Case("A folder with a file missing", "saved/state.json", b'{"_data_files": [{"filename": "data-0.arrow"}]}',
         work=lambda folder: _train(folder / "saved")),
    Case("A folder with a selection of rows", "saved/state.json",
         b'{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}',
         work=lambda folder: _train(folder / "saved")),
)  # fmt: skip
RECORD_CASES = (
    Case("Keys of no format", "train.jsonl", lines({"frage": "q", "antwort": "a"})),
    Case("Keys of several formats", "train.jsonl", lines({**GOOD, "text": "t"})),
    Case("Two formats in a file", "train.jsonl", lines(GOOD, {"text": "t"})),
    Case("A format that does not exist", "train.jsonl", lines(GOOD), {"format": "alpaka"}),
    Case("A format whose keys are not there", "train.jsonl", lines(GOOD), {"format": "alpaca"}),
    Case("A column that is not there", "train.jsonl", lines(GOOD), {"columns": {"frage": "question"}}),
    Case("A field that no format has", "train.jsonl", lines(GOOD), {"columns": {"question": "frage"}}),
    Case("A column mapped to one that is there", "train.jsonl", lines({**GOOD, "frage": "x"}),
         {"columns": {"frage": "question"}}),
    Case("A path that leads nowhere", "train.jsonl", lines({"answers": [], **GOOD}),
         {"columns": {"answers[0].text": "output"}}),
    Case("Not text", "train.jsonl", lines({"question": "q", "answer": 7})),
    Case("Null", "train.jsonl", lines({"question": "q", "answer": None})),
    Case("An empty question", "train.jsonl", lines({"question": "", "answer": "a"})),
    Case("No instruction at all", "train.jsonl", lines({"instruction": "", "input": "", "output": "a"})),
    Case("A history that is none", "train.jsonl", lines({"instruction": "i", "output": "o", "history": [["q"]]})),
)  # fmt: skip
CHAT_CASES = (
    Case("No turns", "train.jsonl", lines({"messages": []})),
    Case("A turn that is none", "train.jsonl", lines({"messages": ["q"]})),
    Case("A turn without a role", "train.jsonl", lines({"messages": [{"content": "q"}]})),
    Case("A role that nobody knows", "train.jsonl", turn(role="boss")),
    Case("A key of a turn that would be lost", "train.jsonl", turn(mood="good")),
    Case("A part that is not text", "train.jsonl", turn(content=[{"type": "image_url"}])),
    Case("A weight that is none", "train.jsonl", turn(weight=0.5)),
    Case("A question that is to be trained", "train.jsonl", turn(weight=1)),
    Case("Two system messages", "train.jsonl",
         lines({"messages": [{"role": "system", "content": "s"}, *TURNS], "system": "t"})),
    Case("A call that is none", "train.jsonl", lines({"conversations": [{"from": "function_call", "value": "f()"}]})),
    Case("A call by the user", "train.jsonl", turn(tool_calls=[{"name": "f"}])),
    Case("A call without a name", "train.jsonl",
         lines({"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]})),
    Case("Tools that are none", "train.jsonl", lines({"messages": TURNS, "tools": "search"})),
    Case("A tool without a name", "train.jsonl", lines({"messages": TURNS, "tools": [{"description": "d"}]})),
    Case("Tools that the template does not write", "train.jsonl",
         lines({"messages": TURNS, "tools": [{"name": "search"}]})),
    Case("Calls that the template does not write", "train.jsonl",
         lines({"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"name": "f"}]}, TURNS[1]]})),
    Case("A turn that the template leaves out", "train.jsonl",
         lines({"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}),
         template="{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>"
         "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    Case("A conversation that the template refuses", "train.jsonl", lines({"messages": [*TURNS, *TURNS]}),
         template="{{ raise_exception('one question only') }}"),
)  # fmt: skip
JUDGED_CASES = (
    Case("Preference pairs", "train.jsonl", lines({"prompt": "q", "chosen": "a", "rejected": "b"})),
    Case("Judged answers", "train.jsonl", lines({"prompt": "q", "completion": "a", "label": True})),
    Case("Two answers that are one", "train.jsonl", lines({"prompt": "q", "chosen": "a", "rejected": "a"})),
    Case("Two answers without a question", "train.jsonl", lines({"chosen": "a", "rejected": "b"})),
    Case("A judged question", "train.jsonl", lines({"messages": TURNS[:1], "label": True})),
)
SET_CASES = (
    Case("Longer than a row", "train.jsonl", lines({"question": "q", "answer": "word " * 100}), {"max_tokens": 64}),
    Case("Cannot be cut", "train.jsonl", lines({**GOOD, "system": "word " * 100}),
         {"max_tokens": 64, "over_length": "cut"}),
    Case("Nothing to train", "train.jsonl", lines({"messages": TURNS[:1]}, {"messages": TURNS[:1]})),
    Case("Everything dropped", "train.jsonl", lines({"question": "q", "answer": "word " * 100}),
         {"max_tokens": 64, "over_length": "drop"}),
    Case("Answers that never end", "train.jsonl", lines(GOOD),
         template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}"),
    Case("Too few to hold a share out", "train.jsonl", lines(GOOD), {"validation": 0.1}),
    Case("Validated on what is trained", "train.jsonl", lines(GOOD), {"validation": "other.jsonl"},
         files={"other.jsonl": lines(GOOD)}),
    Case("The same file twice", "train.jsonl", lines(GOOD), {"validation": "train.jsonl"}),
    Case("A data set's name that is none", "train.jsonl", lines(GOOD),
         work=lambda folder: _train(Path("hf://owner/name"))),
)  # fmt: skip
WRITING_CASES = (
    Case("A format with no place for it", "train.jsonl", lines({"messages": [*TURNS, *TURNS]}),
         work=lambda folder: convert_file(folder / "train.jsonl", folder / "out.jsonl", "question_answer")),
    Case("Nothing rejected", "train.jsonl", lines(GOOD),
         work=lambda folder: convert_file(folder / "train.jsonl", folder / "out.jsonl", "preference")),
    Case("A table of lists", "train.jsonl", lines({"messages": TURNS}),
         work=lambda folder: convert_file(folder / "train.jsonl", folder / "out.csv", "messages")),
    Case("A file that is there", "train.jsonl", lines(GOOD),
         work=lambda folder: convert_file(folder / "train.jsonl", folder / "train.jsonl", "messages")),
    Case("Two files of other lengths", "a.txt", b"one\ntwo", files={"b.txt": b"eins"},
         work=lambda folder: convert_file(folder / "a.txt", folder / "out.jsonl", "messages",
                                          answers=folder / "b.txt")),
    Case("Shares that are none", "train.jsonl", lines(GOOD),
         work=lambda folder: split_file(folder / "train.jsonl", folder / "parts", {"test": 1.5})),
    Case("Too few for a part", "train.jsonl", lines(GOOD),
         work=lambda folder: split_file(folder / "train.jsonl", folder / "parts", {"test": 0.1})),
    Case("A group's key that is missing", "train.jsonl", lines(GOOD),
         work=lambda folder: split_file(folder / "train.jsonl", folder / "parts", {"test": 0.5}, group="database")),
    Case("A folder that is not empty", "train.jsonl", lines(GOOD),
         work=lambda folder: split_file(folder / "train.jsonl", folder, {"test": 0.5})),
)  # fmt: skip
CHAPTERS = {
    "Files": FILE_CASES,
    "JSON": JSON_CASES,
    "Tables": TABLE_CASES,
    "Records": RECORD_CASES,
    "Chats and tools": CHAT_CASES,
    "Answers with a judgement": JUDGED_CASES,
    "The set as a whole": SET_CASES,
    "Converting and splitting": WRITING_CASES,
}


@cache
def _tokenizer() -> Any:
    return find_model("bundled").tokenizer()


@cache
def _own_template() -> str:
    return str(find_model("bundled").tokenizer().chat_template)


def _train(path: Path, template: str | None = None, **settings: Any) -> None:
    source = {name: settings.pop(name) for name in ("format", "columns") if name in settings}
    tokenizer = _tokenizer()
    tokenizer.chat_template = template or _own_template()
    try:
        run = RunConfig.model_validate({"data": {"train": [{"path": str(path), **source}], **settings}})
    except ValidationError as error:
        raise InputError([str(found["ctx"]["error"]) for found in error.errors()]) from None
    data: DataSettings = run.data
    load_training_data(data, tokenizer)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def said(case: Case) -> str:
    """What fitune says of the mistake. Raises AssertionError where it says nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, content in {case.name: case.content, **case.files}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        with _inside(folder):
            try:
                if case.work is not None:
                    case.work(Path())
                else:
                    _train(Path(case.name), case.template, **case.settings)
            except InputError as error:
                return str(error).replace(str(folder), "")
    raise AssertionError(f"{case.title}: nothing was said")


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for chapter, cases in CHAPTERS.items():
        parts.append(f"## {chapter}\n")
        parts += [f"**{case.title}**\n\n```text\n{said(case)}\n```\n" for case in cases]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    sys.exit()
