from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fitune.data import encoded_file, encoding_pool
from fitune.data.encoded_file import Wanted, encode_file
from fitune.data.encoding_pool import EncodingSettings, encode_samples
from fitune.data.reading import read_samples
from fitune.data.token_table import Samples
from fitune.errors import DiskFullError, FituneError, InputError
from fitune.models.cache import locked

HOW = EncodingSettings(64, "cut", "assistant", None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoded_file, "KEPT_FROM_BYTES", 2000)
    return tmp_path / "cache" / "tokens"


def written(path: Path, count: int = 1000, words: int = 1) -> Path:
    lines = [json.dumps({"question": f"What is {n}?" + " or" * words * n, "answer": "It."}) for n in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def entries(cache: Path) -> list[Path]:
    return sorted(entry for entry in cache.iterdir() if entry.is_dir())


def test_several_processes_find_what_one_finds(
    shared_data: Path, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = read_samples(shared_data / "llamafactory_demo" / "alpaca_en_demo.json")
    monkeypatch.setattr(encoding_pool, "CHUNK_SAMPLES", 37)
    alone = list(encode_samples(samples, smollm2_tokenizer, HOW))
    several = list(encode_samples(samples, smollm2_tokenizer, HOW, processes=3))
    assert len(alone) == 27
    for one, other in zip(alone, several, strict=True):
        assert one[1] == other[1]
        assert all((one[0][name] == other[0][name]).all() for name in one[0])
    assert sum(tally.cut for _, tally in alone) > 100


def test_a_large_file_is_encoded_once(
    tmp_path: Path, cache: Path, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.jsonl")
    heard: list[int] = []
    first = encode_file(Wanted(str(path)), smollm2_tokenizer, HOW, lambda file, count: heard.append(count))
    assert first.folder == entries(cache)[0]
    assert heard[-1] == first.tally.samples == 1000
    monkeypatch.setattr(encoded_file, "encode_samples", lambda *_: pytest.fail("encoded a second time"))
    moved = path.rename(tmp_path / "b.jsonl")  # the same content
    again = encode_file(Wanted(str(moved)), smollm2_tokenizer, HOW)
    assert Samples([again.table]) == Samples([first.table])
    assert again.tally == first.tally
    assert (again.table[7].origin, first.table[7].origin) == (again.table.origin(7), first.table.origin(7))
    assert str(again.table.origin(7)) == f"{moved} line 8"


def test_in_memory_and_on_disk_are_the_same(
    tmp_path: Path, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.jsonl", 300)
    on_disk = encode_file(Wanted(str(path)), smollm2_tokenizer, HOW)
    monkeypatch.setattr(encoded_file, "KEPT_FROM_BYTES", 1 << 40)
    in_memory = encode_file(Wanted(str(path)), smollm2_tokenizer, HOW)
    assert in_memory.folder is None
    assert list(Samples([in_memory.table])) == list(Samples([on_disk.table]))
    assert in_memory.tally == on_disk.tally
    assert on_disk.tally.cut > 100


@pytest.mark.parametrize("changed", ["content", "settings", "template", "format", "suffix"])
def test_whatever_decides_the_tokens_makes_another_entry(
    changed: str, tmp_path: Path, cache: Path, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.jsonl", 100)
    encode_file(Wanted(str(path)), smollm2_tokenizer, HOW)
    wanted, how = Wanted(str(path)), HOW
    if changed == "content":
        path.write_bytes(path.read_bytes().replace(b"What is 5?", b"What is 6?"))
    elif changed == "settings":
        how = EncodingSettings(64, "cut", "all", None)
    elif changed == "template":
        monkeypatch.setattr(
            smollm2_tokenizer, "chat_template", smollm2_tokenizer.chat_template.replace("SmolLM", "Smol")
        )
    elif changed == "format":
        wanted = Wanted(str(path), "question_answer")
    else:
        wanted = Wanted(str(path.rename(tmp_path / "a.ndjson")))
    encode_file(wanted, smollm2_tokenizer, how)
    assert len(entries(cache)) == 2


def test_nothing_is_kept_of_a_file_that_is_broken(tmp_path: Path, cache: Path, smollm2_tokenizer: Any) -> None:
    path = written(tmp_path / "a.jsonl", 200)
    lines = path.read_text().splitlines()
    lines[10], lines[150] = "{", '{"question": 5, "answer": "x"}'
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as refused:
        encode_file(Wanted(str(path)), smollm2_tokenizer, HOW)
    assert [problem[:8] for problem in refused.value.problems] == ["line 11:", "line 151"]
    assert entries(cache) == []


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, cache: Path, smollm2_tokenizer: Any) -> None:
    path = written(tmp_path / "a.jsonl", 600)

    def change(file: str, count: int) -> None:
        os.utime(path, ns=(1, count))

    with pytest.raises(InputError, match="changed while it was read"):
        encode_file(Wanted(str(path)), smollm2_tokenizer, HOW, change)
    assert entries(cache) == []


def test_a_disk_too_small_is_said_before(
    tmp_path: Path, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.jsonl")
    monkeypatch.setattr(encoded_file, "disk_free_bytes", lambda folder: 3000)
    with pytest.raises(DiskFullError, match=r"may take .* where 0\.0 GB are free.*FITUNE_CACHE"):
        encode_file(Wanted(str(path)), smollm2_tokenizer, HOW)


def test_a_process_that_is_killed_is_told_of(shared_data: Path, smollm2_tokenizer: Any) -> None:
    samples = read_samples(shared_data / "llamafactory_demo" / "alpaca_en_demo.json") * 20
    chunks = encode_samples(samples, smollm2_tokenizer, HOW, processes=2)
    next(chunks)
    import multiprocessing

    victim = multiprocessing.active_children()[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(FituneError, match="one of the 2 processes that tokenise crashed, or was ended"):
        list(chunks)


ENCODING = """
import sys
from fitune.data import read_samples
from fitune.data.encoding_pool import EncodingSettings, encode_samples
from fitune.models.find import find_model

samples = read_samples(sys.argv[1]) * 1000
for number, _ in enumerate(encode_samples(samples, find_model("bundled").tokenizer(),
                                          EncodingSettings(64, "cut", "assistant", None), processes=2)):
    if number == 1:
        import multiprocessing
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""


def test_processes_end_with_the_one_that_started_them(shared_data: Path) -> None:
    file = shared_data / "llamafactory_demo" / "alpaca_en_demo.json"
    with subprocess.Popen([sys.executable, "-c", ENCODING, str(file)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


@pytest.mark.parametrize("damage", ["cut", "gone", "headless"])
def test_a_damaged_table_is_made_again(tmp_path: Path, cache: Path, smollm2_tokenizer: Any, damage: str) -> None:
    path = written(tmp_path / "a.jsonl", 100)
    first = encode_file(Wanted(str(path)), smollm2_tokenizer, HOW)
    file = entries(cache)[0] / ("table.json" if damage == "headless" else "length.bin")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        file.unlink()
    again = encode_file(Wanted(str(path)), smollm2_tokenizer, HOW)
    assert len(again.table) == len(first.table) == 100
    assert len(entries(cache)) == 1


def test_refusals_name_the_file_that_was_given(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    how = EncodingSettings(64, "error", "assistant", None)
    path = written(tmp_path / "a.jsonl", 100)
    assert encode_file(Wanted(str(path)), smollm2_tokenizer, how).tally.refused[0].startswith(f"{path} line")
    moved = path.rename(tmp_path / "b.jsonl")
    assert encode_file(Wanted(str(moved)), smollm2_tokenizer, how).tally.refused[0].startswith(f"{moved} line")


def test_what_killed_processes_left_is_removed_and_nothing_that_is_written(
    tmp_path: Path, cache: Path, smollm2_tokenizer: Any
) -> None:
    left, written_now, of_another = cache / ".dead-a1b2c3", cache / ".alive-a1b2c3", cache / ".notes-x"
    for folder in (left, written_now, of_another):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"1234")
    (cache / "dead.lock").touch()
    with locked(cache / "alive.lock"):
        encode_file(Wanted(str(written(tmp_path / "a.jsonl"))), smollm2_tokenizer, HOW)
        assert [folder.exists() for folder in (left, written_now, of_another)] == [False, True, True]


def test_waiting_for_another_process_is_said(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    entered = threading.Event()

    def enter() -> None:
        with locked(cache / "one.lock"):
            entered.set()

    with locked(cache / "one.lock"):
        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.3)
        assert "waiting for another process" in caplog.text
    waiting.join(10)
    assert entered.is_set()
