"""A data file in, files for training, validation and test out: seeded, disjoint, nothing of one seen in another."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitune.atomic import new_folder
from fitune.data.columns import value_at
from fitune.data.fields import RecordError
from fitune.data.file_lines import COMPRESSED
from fitune.data.record import Problems
from fitune.data.record_writing import WRITTEN, write_records
from fitune.data.sources import kind_of, stream_records
from fitune.errors import InputError

TRAIN = "train"


@dataclass(frozen=True, slots=True)
class Split:
    """What was written.

    Attributes:
        files: part -> file.
        samples: part -> how many samples it has.
        duplicates: samples that say the same as an earlier one, but for case and spaces; they lie in its part.
        groups: how many values the key has by which samples stay together; 0: there is none.
    """

    files: Mapping[str, str]
    samples: Mapping[str, int]
    duplicates: int
    groups: int


def split_file(
    source: Path, folder: Path, shares: Mapping[str, float], seed: int = 0, group: str | None = None,
    stratify: str | None = None,
) -> Split:  # fmt: skip
    """Writes `folder` with a file for every part: those of `shares`, and "train" with the rest.

    Records stay as they are, in their order. The same file, shares and seed give the same parts.

    Args:
        shares: part -> which share of the samples, above 0; together below 1.
        group: a key (or a path such as `meta.database`); samples with the same value stay in one part.
        stratify: a key; every value of it has its share in every part, as far as groups allow.

    Raises:
        InputError: the file cannot be read, a record lacks a key, the folder is there, or a part would be empty.
    """
    _check_shares(shares)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("the folder is there and is not empty; name another, or remove it", where=folder)
    problems = Problems(str(source))
    keys = _read_keys(source, problems, group, stratify)
    problems.raise_if_any()
    units = _units(keys)
    part_of = _assign(units, keys.strata, shares, seed)
    counts = Counter(part_of)
    empty = [part for part in (TRAIN, *shares) if not counts[part]]
    if empty:
        raise InputError(
            f"{len(keys.digests)} samples in {len(units)} groups that must stay together are too few: nothing is "
            f"left for {' and '.join(empty)}; take larger or fewer shares",
            where=source,
        )
    suffix = _suffix(source)
    names = {part: f"{part}{suffix}" for part in (TRAIN, *shares)}
    with new_folder(folder) as beside:
        for part, name in names.items():
            records = (
                record.value
                for own, record in zip(part_of, stream_records(source, Problems(str(source))), strict=True)
                if own == part
            )
            write_records(beside / name, records)
    return Split(
        {part: str(folder / name) for part, name in names.items()},
        {part: counts[part] for part in names},
        len(keys.digests) - len(set(keys.digests)),
        len(set(keys.groups)),
    )


@dataclass(slots=True)
class _Keys:
    """Of every record: what it says, what it belongs to, and what kind it is of."""

    digests: list[bytes]
    groups: list[Hashable]
    strata: list[Hashable]


def _read_keys(source: Path, problems: Problems, group: str | None, stratify: str | None) -> _Keys:
    keys = _Keys([], [], [])
    for record in stream_records(source, problems):
        try:
            if not isinstance(record.value, dict):
                raise RecordError("a sample must be an object")
            keys.digests.append(content_digest(record.value))
            for path, values in ((group, keys.groups), (stratify, keys.strata)):
                if path is not None:
                    values.append(_hashable(value_at(record.value, path)))
        except RecordError as error:
            problems.add(record.line, str(error))
    return keys


def content_digest(record: Mapping[str, Any]) -> bytes:
    """The same for records that say the same, but for case, spaces and the order of keys (BLAKE2b, 128 bits)."""
    try:
        text = json.dumps(_plainly(record), ensure_ascii=False, sort_keys=True, default=str)
    except RecursionError:
        raise RecordError("nested too deeply") from None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _plainly(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, Mapping):
        return {key: _plainly(inner) for key, inner in value.items()}
    return [_plainly(inner) for inner in value] if isinstance(value, list) else value


def _hashable(value: Any) -> Hashable:
    return (
        value
        if isinstance(value, str | int | float | bool | None)
        else json.dumps(value, sort_keys=True, default=str)
    )


def _units(keys: _Keys) -> list[list[int]]:
    """Records that must stay together: those that say the same, and those of one group, and so on."""
    parent = array("q", range(len(keys.digests)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for values in (keys.digests, keys.groups):
        first: dict[Hashable, int] = {}
        for index, value in enumerate(values):
            parent[root(index)] = root(first.setdefault(value, index))
    units: dict[int, list[int]] = defaultdict(list)
    for index in range(len(parent)):
        units[root(index)].append(index)
    return list(units.values())


def _assign(
    units: Sequence[Sequence[int]], strata: Sequence[Hashable], shares: Mapping[str, float], seed: int
) -> list[str]:
    """The part of every record."""
    by_stratum: dict[Hashable, list[Sequence[int]]] = defaultdict(list)
    for unit in units:
        kind = Counter(strata[index] for index in unit).most_common(1)[0][0] if strata else None
        by_stratum[kind].append(unit)
    part_of = [TRAIN] * sum(map(len, units))
    for number, (_, own) in enumerate(sorted(by_stratum.items(), key=lambda item: str(item[0]))):
        random.Random(f"split of stratum {number} with seed {seed}").shuffle(own)
        samples = sum(map(len, own))
        for part, share in shares.items():
            wanted, taken = share * samples, 0
            rest: list[Sequence[int]] = []
            for place, unit in enumerate(own):
                is_last = not rest and place + 1 == len(own)
                # A unit is taken if that brings the part nearer to its share.
                if not is_last and abs(wanted - taken - len(unit)) <= wanted - taken:
                    taken += len(unit)
                    for index in unit:
                        part_of[index] = part
                else:
                    rest.append(unit)
            own = rest
    return part_of


def _check_shares(shares: Mapping[str, float]) -> None:
    wrong = [f"{part}: {share:g}" for part, share in shares.items() if not 0 < share < 1]
    if wrong or not shares or sum(shares.values()) >= 1:
        raise InputError(
            f"shares must be above 0, and together below 1; found {', '.join(wrong) or dict(shares) or 'none'}"
        )


def _suffix(source: Path) -> str:
    """That of the source, or .jsonl where such a file is not written."""
    if kind_of(source) not in WRITTEN:
        return ".jsonl"
    packed = source.suffix if source.suffix.lower() in COMPRESSED else ""
    return kind_of(source) + packed.lower()
