"""Samples as records of a format, and records as files: what `read_samples` reads back is the same again."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from fitune.atomic import new_file
from fitune.data.columnar_records import pyarrow_for
from fitune.data.conversation import Message, Sample
from fitune.data.fields import RecordError, keys_of
from fitune.data.file_lines import COMPRESSED, zstandard_for
from fitune.errors import InputError

_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
WRITTEN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def record_of(sample: Sample, format: str) -> dict[str, Any]:
    """The sample as a record of the format, with the keys in `extra` behind.

    Raises:
        RecordError: the format has no place for some of it.
    """
    record = _RECORDS[format](sample)
    taken = [key for key in sample.extra if key in record]
    if taken:
        raise RecordError(f"the keys {', '.join(taken)} of the file mean something else in the format {format}")
    return {**record, **sample.extra}


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes a .jsonl, .ndjson, .json, .csv, .tsv (each also .gz or .zst) or .parquet file; how many there were.

    The file is there whole or not at all.

    Raises:
        InputError: the suffix is another one, the folder is not there, or a record does not fit into a table.
    """
    kind = written_kind(path)
    with new_file(path) as beside, ExitStack() as closing:
        if kind == ".parquet":
            return _write_parquet(beside, records, path)
        text = _opened(beside, path.suffix.lower(), closing)
        if kind in (".csv", ".tsv"):
            return _write_table(text, records, "," if kind == ".csv" else "\t", path)
        return _write_json(text, records, kind == ".json", path)


def written_kind(path: Path) -> str:
    """The suffix without that of compression. Raises InputError where no such file can be written there."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    kind = (suffixes[-2] if len(suffixes) > 1 else "") if is_packed else (suffixes or [""])[-1]
    if kind not in WRITTEN or (is_packed and kind == ".parquet"):
        raise InputError(
            f"cannot write a file of the kind {''.join(suffixes[-2:]) or '(no suffix)'}; known: "
            f"{', '.join(WRITTEN)}, all but .parquet also with {' or '.join(COMPRESSED)}",
            where=path,
        )
    if not path.absolute().parent.is_dir():
        raise InputError(f"there is no folder {path.absolute().parent} to write it in", where=path)
    return kind


def _write_json(text: IO[str], records: Iterable[Mapping[str, Any]], is_list: bool, path: Path) -> int:
    count = 0
    for count, record in enumerate(records, 1):
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"record {count} holds what JSON does not have: {error}; take .parquet", where=path
            ) from None
        if is_list:
            text.write("[\n" if count == 1 else ",\n")
        text.write(line)
        if not is_list:
            text.write("\n")
    if is_list:
        text.write("\n]\n" if count else "[]\n")
    return count


def _write_table(text: IO[str], records: Iterable[Mapping[str, Any]], delimiter: str, path: Path) -> int:
    writer, names, count = csv.writer(text, delimiter=delimiter, lineterminator="\n"), [], 0
    for count, record in enumerate(records, 1):
        if count == 1:
            names = list(record)
            writer.writerow(names)
        elif list(record) != names:
            raise InputError(
                f"record {count} has the keys {keys_of(record)}, the first one {', '.join(names[:20])}; a table "
                "needs the same in all of them: take .jsonl",
                where=path,
            )
        wrong = [name for name, value in record.items() if not isinstance(value, str | int | float | bool)]
        if wrong:
            raise InputError(f"record {count}: {', '.join(wrong)} does not fit into a cell; take .jsonl", where=path)
        writer.writerow([str(value).lower() if isinstance(value, bool) else value for value in record.values()])
    return count


def _write_parquet(beside: Path, records: Iterable[Mapping[str, Any]], path: Path) -> int:
    pyarrow = pyarrow_for(path)
    try:
        table = pyarrow.Table.from_pylist([dict(record) for record in records])
        pyarrow.parquet.write_table(table, beside)
    except pyarrow.ArrowException as error:
        raise InputError(f"the records do not make one table ({error}); take .jsonl", where=path) from None
    return int(table.num_rows)


def _opened(path: Path, compression: str, closing: ExitStack) -> IO[str]:
    file: Any = closing.enter_context(path.open("wb"))
    if compression == ".gz":
        # No time and no name in it: the same records are the same bytes.
        file = closing.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0))
    elif compression == ".zst":
        file = closing.enter_context(zstandard_for(path).ZstdCompressor().stream_writer(file))
    return closing.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline=""))


def _alpaca(sample: Sample) -> dict[str, Any]:
    system, exchanges = _exchanges(sample, "alpaca")
    question, answer = exchanges[-1]
    record: dict[str, Any] = {"instruction": question, "input": "", "output": answer}
    if system:
        record["system"] = system
    if exchanges[:-1]:
        record["history"] = [list(pair) for pair in exchanges[:-1]]
    return record


def _one_exchange(format: str, question: str, answer: str) -> Any:
    def record_of_one(sample: Sample) -> dict[str, Any]:
        system, exchanges = _exchanges(sample, format)
        if len(exchanges) > 1:
            raise RecordError(f"{len(exchanges)} exchanges, and the format {format} has one; take messages")
        return {question: exchanges[0][0], answer: exchanges[0][1], **({"system": system} if system else {})}

    return record_of_one


def _exchanges(sample: Sample, format: str) -> tuple[str, list[tuple[str, str]]]:
    """System message, and questions with their answers; for formats that have nothing else."""
    _refuse_judged(sample, format)
    messages = list(sample.messages)
    system = messages.pop(0).content if messages and messages[0].role == "system" else ""
    roles = [message.role for message in messages]
    is_plain = not sample.tools and not any(
        m.tool_calls or m.trained is not None or m.name or m.call_id for m in messages
    )
    if not messages or roles != ["user", "assistant"] * (len(roles) // 2) or not is_plain:
        raise RecordError(
            f"the format {format} has questions and answers in turns and nothing else; this one needs messages "
            f"(turns: {', '.join(roles) or 'none'}{'' if is_plain else '; tools or weights'})"
        )
    texts = [message.content for message in messages]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def _messages(sample: Sample) -> dict[str, Any]:
    _refuse_judged(sample, "messages")
    return {"messages": [_openai_turn(message) for message in _needed(sample)], **_tools(sample)}


def _sharegpt(sample: Sample) -> dict[str, Any]:
    _refuse_judged(sample, "sharegpt")
    turns = [_sharegpt_turn(message) for message in _needed(sample)]
    tools = {"tools": json.dumps(list(sample.tools), ensure_ascii=False)} if sample.tools else {}
    return {"conversations": turns, **tools}


def _text(sample: Sample) -> dict[str, Any]:
    if sample.text is None:
        raise RecordError("the format text is for plain text, and this is a conversation")
    return {"text": sample.text}


def _preference(sample: Sample) -> dict[str, Any]:
    if not sample.rejected:
        raise RecordError("the format preference needs a rejected answer beside the chosen one, and there is none")
    shared = 0
    while sample.messages[shared : shared + 1] == sample.rejected[shared : shared + 1]:
        shared += 1
    return {
        "prompt": [_openai_turn(message) for message in sample.messages[:shared]],
        "chosen": [_openai_turn(message) for message in sample.messages[shared:]],
        "rejected": [_openai_turn(message) for message in sample.rejected[shared:]],
        **_tools(sample),
    }


def _kto(sample: Sample) -> dict[str, Any]:
    if sample.label is None:
        raise RecordError("the format kto needs a label, and there is none")
    return {
        "messages": [_openai_turn(message) for message in sample.messages],
        "label": sample.label,
        **_tools(sample),
    }


def _needed(sample: Sample) -> tuple[Message, ...]:
    if sample.text is not None:
        raise RecordError("this is plain text, and no conversation can be made of it; take the format text")
    return sample.messages


def _refuse_judged(sample: Sample, format: str) -> None:
    if sample.text is not None:
        raise RecordError("this is plain text, and no conversation can be made of it; take the format text")
    if sample.rejected:
        raise RecordError(f"a preference pair has a rejected answer, which the format {format} would lose")
    if sample.label is not None:
        raise RecordError(f"the answer has a label, which the format {format} would lose")


def _openai_turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "type": "function",
                **({"id": call.id} if call.id else {}),
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in message.tool_calls
        ]
    if message.name:
        turn["name"] = message.name
    if message.call_id:
        turn["tool_call_id"] = message.call_id
    return turn | _weight(message)


def _sharegpt_turn(message: Message) -> dict[str, Any]:
    if message.name or message.call_id or any(call.id for call in message.tool_calls):
        raise RecordError("names and ids of calls have no place in the format sharegpt; take messages")
    if not message.tool_calls:
        return {"from": _SHAREGPT[message.role], "value": message.content} | _weight(message)
    if message.content:
        raise RecordError("a turn with a text and a call has no place in the format sharegpt; take messages")
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    return {"from": "function_call", "value": value} | _weight(message)


def _weight(message: Message) -> dict[str, Any]:
    return {} if message.trained is None else {"weight": int(message.trained)}


def _tools(sample: Sample) -> dict[str, Any]:
    return {"tools": list(sample.tools)} if sample.tools else {}


_RECORDS: Mapping[str, Any] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt_completion": _one_exchange("prompt_completion", "prompt", "completion"),
    "question_answer": _one_exchange("question_answer", "question", "answer"),
    "text": _text,
    "preference": _preference,
    "kto": _kto,
}
