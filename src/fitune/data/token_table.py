"""Encoded samples as columns of numbers, in memory or in files: as many as a disk holds, read one at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fitune.data.conversation import Origin
from fitune.data.encoding import EncodedSample

# A token and whether it is trained lie in one number; no vocabulary has 2 ** 31 entries.
_TRAINED = 1 << 31
# What is kept of a sample: (type, numbers). `number`: which sample of its file it is, from 0 (the parts of a
# text that was split have the same); `key`, `key2`: as `Samples.keys`; `marks`: what EncodedSample counts.
COLUMNS: Mapping[str, tuple[str, int]] = {
    "tokens": ("<u4", 1),
    "length": ("<u4", 1),
    "trained": ("<u4", 1),
    "line": ("<u8", 1),
    "number": ("<u8", 1),
    "key": ("<u8", 1),
    "key2": ("<u8", 1),
    "marks": ("<u4", 8),
}

# Which of a sample's marks is its label; so many samples' are read at once to look at it.
_LABEL, _LABELS_AT_ONCE = 7, 1 << 16
# Files that stay open, of all tables together; systems allow a process 1,024, or 256, and tables may be more.
_OPEN_FILES = 96

Columns = Mapping[str, NDArray[Any]]
Places = NDArray[np.int64]


def packed(samples: Sequence[EncodedSample], numbers: Sequence[int] | None = None) -> dict[str, NDArray[Any]]:
    """Samples as the columns of a table; `numbers`: which samples of their file they are (None: in order)."""
    words = [
        np.array(sample.tokens, dtype=np.uint32) | (np.array(sample.trained, dtype=np.uint32) << np.uint32(31))
        for sample in samples
    ]
    marks = [
        (
            s.without_end_token, s.control_tokens_in_text, s.lost_characters, s.is_cut, s.lost_end,
            s.worse_from, s.fork, 0 if s.label is None else 1 + s.label,
        )
        for s in samples
    ]  # fmt: skip
    keys = [_key(word) for word in words]
    columns = {
        "tokens": np.concatenate(words) if words else [],
        "length": [len(sample) for sample in samples],
        "trained": [sample.trained_tokens for sample in samples],
        "line": [sample.origin.line if sample.origin else 0 for sample in samples],
        "number": range(len(samples)) if numbers is None else numbers,
        "key": [int(one) for one, _ in keys],
        "key2": [int(other) for _, other in keys],
        "marks": marks,
    }
    return {name: _shaped(np.asarray(values, dtype=COLUMNS[name][0]), name) for name, values in columns.items()}


def tokens_and_mask(words: NDArray[np.uint32]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """A sample's tokens, and which of them are trained."""
    return tuple((words & np.uint32(_TRAINED - 1)).tolist()), tuple((words >= np.uint32(_TRAINED)).tolist())


def _key(words: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """The same for two samples exactly if they have the same tokens and the same mask (BLAKE2b, 128 bits)."""
    return np.frombuffer(hashlib.blake2b(words.astype("<u4").tobytes(), digest_size=16).digest(), dtype="<u8")


def _bytes_each(name: str) -> int:
    kind, width = COLUMNS[name]
    return np.dtype(kind).itemsize * width


def _shaped(values: NDArray[Any], name: str) -> NDArray[Any]:
    width = COLUMNS[name][1]
    return values.reshape(-1, width) if width > 1 else values


class TokenTable:
    """The encoded samples of one file of data, in its order.

    Attributes:
        length, trained: of every sample how many tokens it has, and how many of them are trained; [samples] uint32.
        start: of every sample how many tokens lie before it, and at last how many there are; [samples + 1] int64.
    """

    def __init__(self, columns: Columns | Path, path: str | None, unit: str = "line") -> None:
        """`columns`: as `packed` makes them, or a `TableWriter`'s folder; `path`, `unit`: of the samples' origin."""
        self._path, self._unit = path, unit
        self._columns = columns if not isinstance(columns, Path) else {}
        self._folder = columns if isinstance(columns, Path) else None
        # Another folder may come to lie there.
        self._inode = 0 if self._folder is None else self._folder.stat().st_ino
        self.length = self._whole("length").astype(np.uint32)
        self.trained = self._whole("trained").astype(np.uint32)
        self.start = np.concatenate([[0], np.cumsum(self.length, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, index: int) -> EncodedSample:
        tokens, trained = tokens_and_mask(self.words(int(self.start[index]), int(self.length[index])))
        line = int(self._read("line", index, 1)[0])
        marks = self._read("marks", index, 1)[0].tolist()
        without_end, control, lost, is_cut, lost_end, worse_from, fork, label = marks
        return EncodedSample(
            tokens,
            trained,
            None if self._path is None else Origin(self._path, line, self._unit),
            without_end,
            control,
            lost,
            bool(is_cut),
            bool(lost_end),
            worse_from,
            fork,
            label == 2 if label else None,
        )

    @property
    def is_on_disk(self) -> bool:
        """Whether samples are read when they are asked for."""
        return self._folder is not None

    def numbers(self) -> NDArray[Any]:
        """Which sample of its file each is, or is a part of, from 0; [samples] uint64."""
        return self._whole("number")

    def keys(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Of every sample two numbers that only equal ones share; [samples] uint64 each."""
        return self._whole("key"), self._whole("key2")

    def labels(self) -> NDArray[np.uint8]:
        """What is said of each judged answer: 1 bad, 2 good; 0 of other samples; [samples]."""
        found = np.empty(len(self), dtype=np.uint8)
        for start in range(0, len(self), _LABELS_AT_ONCE):
            count = min(_LABELS_AT_ONCE, len(self) - start)
            found[start : start + count] = self._read("marks", start, count)[:, _LABEL]
        return found

    def origin(self, index: int) -> Origin | None:
        """Where a sample comes from."""
        if self._path is None:
            return None
        return Origin(self._path, int(self._read("line", index, 1)[0]), self._unit)

    def words(self, start: int, count: int) -> NDArray[np.uint32]:
        """So many tokens from `start` on, counted over all samples, with their mask: for `tokens_and_mask`."""
        return self._read("tokens", start, count).astype(np.uint32, copy=False)

    def _open(self, name: str) -> _OpenFile:
        assert self._folder is not None
        return _opened(self._folder / f"{name}.bin", self._inode)

    def _whole(self, name: str) -> NDArray[Any]:
        if self._folder is None:
            return self._columns[name]
        return _shaped(np.fromfile(self._folder / f"{name}.bin", dtype=COLUMNS[name][0]), name)

    def _read(self, name: str, start: int, count: int) -> NDArray[Any]:
        if self._folder is None:
            return self._columns[name][start : start + count]
        file = self._open(name)
        size = _bytes_each(name)
        parts, place, end = [], start * size, (start + count) * size
        while place < end:  # a read may come in parts
            part = os.pread(file.descriptor, min(end - place, 1 << 30), place)
            if not part:
                raise OSError(f"{file.path} is shorter than it was")
            parts.append(part)
            place += len(part)
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        return _shaped(np.frombuffer(whole, dtype=COLUMNS[name][0]), name)


class _OpenFile:
    """Read at places, never mapped: mapped pages would count as this process's memory. Closed when nobody has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path, of_folder: int) -> _OpenFile:
    return _OpenFile(path)


class TableWriter:
    """Collects columns, in memory or (given a `folder`) in files of it."""

    def __init__(self, folder: Path | None = None) -> None:
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in COLUMNS}
        self._files = {} if folder is None else {name: open(folder / f"{name}.bin", "wb") for name in COLUMNS}  # noqa: SIM115

    def append(self, columns: Columns) -> None:
        """Adds samples, as `packed` makes columns of them."""
        for name, values in columns.items():
            if self._files:
                self._files[name].write(np.ascontiguousarray(values).data)
            else:
                self._parts[name].append(values)

    def close(self) -> Columns:
        """All columns (of a writer to files: none; they are in the folder)."""
        for file in self._files.values():
            file.close()
        if self._files:
            return {}
        nothing = packed([])
        return {name: np.concatenate([nothing[name], *parts]) for name, parts in self._parts.items()}


class Samples(Sequence[EncodedSample]):
    """Some of the samples of several tables, in any order and as often as wanted.

    Millions of them are held: a place each, and what is asked for only while it is used, but for `lengths`.

    Attributes:
        tables: where they are.
        chosen: which of all samples of the tables, one after the other; [samples] integers.
    """

    def __init__(self, tables: Sequence[TokenTable], chosen: NDArray[Any] | None = None) -> None:
        self.tables = tuple(tables)
        self._bounds = np.concatenate([[0], np.cumsum([len(table) for table in self.tables], dtype=np.int64)])
        count = int(self._bounds[-1])
        kind = np.int32 if count < 1 << 31 else np.int64
        self.chosen: NDArray[Any] = (
            np.arange(count, dtype=kind) if chosen is None else chosen.astype(kind, copy=False)
        )

    @classmethod
    def of(cls, samples: Iterable[EncodedSample]) -> Samples:
        """Samples in memory; of their origins only the lines are kept."""
        return cls([TokenTable(packed(list(samples)), None)])

    @cached_property
    def lengths(self) -> NDArray[np.uint32]:
        """Of every sample how many tokens it has; [samples]."""
        return self._of_all([table.length for table in self.tables])

    def trained_tokens(self) -> int:
        """Of all samples together."""
        return int(self._of_all([table.trained for table in self.tables]).sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> EncodedSample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> EncodedSample | Samples:
        if isinstance(index, slice):
            return Samples(self.tables, self.chosen[index])
        table, place = self._place(index)
        return self.tables[table][place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    def take(self, places: NDArray[Any]) -> Samples:
        """Those at `places`, in that order."""
        return Samples(self.tables, self.chosen[places])

    def by_table(self, indices: Places) -> Iterator[tuple[TokenTable, Places, Places]]:
        """The samples at `indices`, table by table: the table, their places in it, ascending, and which each is."""
        chosen = self.chosen[indices].astype(np.int64)
        order = np.argsort(chosen, kind="stable")
        ends = np.searchsorted(chosen[order], self._bounds)
        for table, bound, start, end in zip(self.tables, self._bounds, ends, ends[1:], strict=False):
            if start < end:
                which = order[start:end]
                yield table, chosen[which] - bound, which

    @property
    def are_on_disk(self) -> bool:
        """Whether any of them are read when they are asked for."""
        return any(table.is_on_disk for table in self.tables)

    def origin(self, index: int) -> Origin | None:
        """Where a sample comes from."""
        table, place = self._place(index)
        return self.tables[table].origin(place)

    def table_of(self) -> NDArray[Any]:
        """Of every sample the number of its table; [samples]."""
        if len(self.tables) == 1:
            return np.zeros(len(self), dtype=np.uint8)
        return np.searchsorted(self._bounds, self.chosen, side="right") - 1

    def keys(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Of every sample two numbers that only equal ones share; [samples] each."""
        found = [table.keys() for table in self.tables]
        one, other = [first for first, _ in found], [second for _, second in found]
        del found
        return self._of_all(one), self._of_all(other)

    def numbers(self) -> NDArray[np.uint64]:
        """Which sample of its file each is, or is a part of, from 0; [samples]."""
        return self._of_all([table.numbers() for table in self.tables])

    def labels(self) -> NDArray[np.uint8]:
        """What is said of each judged answer: 1 bad, 2 good; 0 of other samples; [samples]."""
        return self._of_all([table.labels() for table in self.tables])

    def digest(self) -> str:
        """A number (hexadecimal) of all tokens, masks and labels in this order."""
        digest = hashlib.blake2b(digest_size=32)
        for column in self.keys():
            digest.update(np.ascontiguousarray(column).data)
        labels = self.labels()
        if labels.any():
            digest.update(np.ascontiguousarray(labels).data)
        return digest.hexdigest()

    def _of_all(self, columns: list[NDArray[Any]]) -> NDArray[Any]:
        """What the tables have of each sample, for the chosen ones."""
        if not columns:
            return np.zeros(0, dtype=np.uint64)
        whole = columns[0] if len(columns) == 1 else np.concatenate(columns)
        columns.clear()
        is_everything = len(whole) == len(self.chosen) and bool((np.diff(self.chosen) == 1).all())
        return whole if is_everything and (not len(whole) or self.chosen[0] == 0) else whole[self.chosen]

    def _place(self, index: int) -> tuple[int, int]:
        place = int(self.chosen[index])
        table = int(np.searchsorted(self._bounds, place, side="right")) - 1
        return table, place - int(self._bounds[table])


def lengths_of(samples: Sequence[EncodedSample]) -> NDArray[np.uint32]:
    """How many tokens each sample has; [samples]."""
    if isinstance(samples, Samples):
        return samples.lengths
    return np.fromiter(map(len, samples), dtype=np.uint32, count=len(samples))
