from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitune.data.sources import read_records
from fitune.data.splitting import content_digest, split_file
from fitune.errors import InputError


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def parts(files: Any) -> dict[str, list[Any]]:
    return {part: [record.value for record in read_records(file)] for part, file in files.items()}


RECORDS = [
    {"question": f"What is {n}?", "answer": "a", "db": f"d{n % 20}", "kind": "easy" if n % 5 else "hard"}
    for n in range(400)
]


def test_parts_are_disjoint_seeded_and_whole(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", RECORDS)
    done = split_file(source, tmp_path / "out", {"validation": 0.1, "test": 0.2}, seed=3)
    found = parts(done.files)
    assert (
        {part: len(own) for part, own in found.items()}
        == {"train": 280, "validation": 40, "test": 80}
        == done.samples
    )
    assert sorted(map(json.dumps, [r for own in found.values() for r in own])) == sorted(map(json.dumps, RECORDS))
    order = {json.dumps(record): place for place, record in enumerate(RECORDS)}
    for own in found.values():
        places = [order[json.dumps(record)] for record in own]
        assert places == sorted(places)  # in the order of the source
    again = split_file(source, tmp_path / "again", {"validation": 0.1, "test": 0.2}, seed=3)
    assert parts(again.files) == found
    other = split_file(source, tmp_path / "other", {"validation": 0.1, "test": 0.2}, seed=4)
    assert parts(other.files) != found


def test_groups_never_straddle_and_strata_have_their_shares(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", RECORDS)
    done = split_file(source, tmp_path / "grouped", {"validation": 0.2}, group="db")
    found = parts(done.files)
    assert not {r["db"] for r in found["train"]} & {r["db"] for r in found["validation"]}
    assert (done.groups, len(found["validation"])) == (20, 80)
    done = split_file(source, tmp_path / "even", {"validation": 0.1}, stratify="kind")
    assert Counter(r["kind"] for r in parts(done.files)["validation"]) == {"easy": 32, "hard": 8}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_what_says_the_same_stays_together(tmp_path: Path, data: Any) -> None:
    texts = data.draw(st.lists(st.sampled_from(["a", " A", "a  ", "b", "c", "d", "e", "f"]), min_size=6, max_size=30))
    records = [{"text": text, "db": data.draw(st.sampled_from("uvwxyz"))} for text in texts]
    grouped = data.draw(st.booleans())
    source, out = write(tmp_path / "a.jsonl", records), tmp_path / "out"
    if out.exists():
        for file in out.iterdir():
            file.unlink()
    try:
        done = split_file(source, out, {"validation": 0.2, "test": 0.2}, group="db" if grouped else None)
    except InputError:  # too few that may part
        return
    found = parts(done.files)
    seen: dict[Any, str] = {}
    for part, own in found.items():
        for record in own:
            for key in [content_digest(record), *([record["db"]] if grouped else [])]:
                assert seen.setdefault(key, part) == part
    assert sum(map(len, found.values())) == len(records)


def test_case_and_spaces_and_the_order_of_keys_say_the_same() -> None:
    same = [{"a": "One two", "b": 1}, {"b": 1, "a": "one\n  TWO "}]
    assert content_digest(same[0]) == content_digest(same[1])
    assert content_digest({"a": "one two", "b": 1}) != content_digest({"a": "one two", "b": 2})


def test_lists_and_compression_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps(RECORDS[:20]), encoding="utf-8")
    assert Path(split_file(source, tmp_path / "list", {"test": 0.2}).files["test"]).name == "test.json"
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"line {n}" for n in range(20)), encoding="utf-8")
    done = split_file(text, tmp_path / "text", {"test": 0.2})
    assert Path(done.files["train"]).name == "train.jsonl"
    assert done.samples == {"train": 16, "test": 4}


@pytest.mark.parametrize(
    ("shares", "options", "message"),
    [
        ({"validation": 0.6, "test": 0.5}, {}, "together below 1"),
        ({}, {}, "together below 1"),
        ({"validation": -0.1}, {}, "above 0"),
        ({"validation": 0.1}, {"group": "nope"}, r'line 1: "nope" is missing'),
        ({"validation": 0.1}, {"group": "same"}, "too few: nothing is left for validation"),
    ],
)
def test_splits_that_cannot_be(tmp_path: Path, shares: Any, options: Any, message: str) -> None:
    source = write(tmp_path / "a.jsonl", [{**record, "same": 1} for record in RECORDS[:20]])
    with pytest.raises(InputError, match=message):
        split_file(source, tmp_path / "out", shares, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", RECORDS[:20])
    with pytest.raises(InputError, match="not empty"):
        split_file(source, tmp_path, {"test": 0.2})
