"""One file of data in, its samples as tokens out; those of a large file are kept on disk, found by its content."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fitune.atomic import new_folder
from fitune.data.conversation import Sample
from fitune.data.encoding_pool import EncodingSettings, encode_samples
from fitune.data.reading import SampleReader
from fitune.data.sources import kind_of
from fitune.data.tally import Tally
from fitune.data.token_table import TableWriter, TokenTable
from fitune.errors import DiskFullError, FituneError, InputError
from fitune.hardware import detect, disk_free_bytes
from fitune.models.cache import cache_folder, locked, remove_unfinished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Smaller files are read in seconds, and their tokens kept in memory.
KEPT_FROM_BYTES = 8_000_000
# Of tokens, for each byte of text: 4 for each token of English, which has about 4 letters, as much again for other
# scripts, and the columns beside. Of compressed text nobody knows.
_DISK_SHARE = 2.0
# Below, one process is done before others have begun.
_SHARED_FROM_BYTES = 1_000_000
_HEAD = "table.json"
_DEPENDENCIES = ("tokenizers", "transformers", "jinja2")

# (what is done, samples done so far)
Watch = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file, and how it is read: `SampleReader`'s arguments."""

    path: str
    format: str = "auto"
    columns: Mapping[str, str] | None = None
    instruction: str = ""

    def reader(self) -> SampleReader:
        """Its samples."""
        return SampleReader(self.path, self.format, self.columns, self.instruction)


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """A file's samples.

    Attributes:
        wanted: the file.
        format: the name of its records' format; unit: what its places count, "line" or "row".
        table: the samples that can be trained on.
        tally: what was found.
        folder: where the tokens are kept; None: in memory.
    """

    wanted: Wanted
    format: str
    unit: str
    table: TokenTable
    tally: Tally
    folder: Path | None = None


def encode_file(
    wanted: Wanted, tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings, watch: Watch | None = None,
    is_kept: bool | None = None,
) -> EncodedFile:  # fmt: skip
    """Reads and encodes a file, or finds what an earlier run kept of it.

    `is_kept`: whether its tokens are to be kept on disk; None: where the file is large.

    Raises:
        InputError: the file cannot be read, or records of it do not fit its format.
        DiskFullError: the tokens of a large file find no room.
    """
    size = bytes_of(Path(wanted.path))
    if not (size >= KEPT_FROM_BYTES if is_kept is None else is_kept and size):
        writer = TableWriter()
        reader, tally = _encode_into(writer, wanted, tokenizer, settings, 1, watch)
        unit = reader.problems.unit
        return EncodedFile(wanted, reader.format, unit, TokenTable(writer.close(), wanted.path, unit), tally)
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # It would wait for the lock that the process holds which waits for it.
        raise FituneError(
            "large data are tokenised by processes that begin by importing this script again; put what it does under "
            'if __name__ == "__main__":'
        )
    try:
        before = _state(wanted.path)
        folder = cache_folder() / "tokens" / _name(wanted, tokenizer, settings)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=wanted.path) from error
    with locked(folder.with_suffix(".lock")):
        if not _is_whole(folder):
            remove_unfinished(folder)
            _check_room(folder, size)
            with new_folder(folder, replace=True) as beside:  # a damaged one may lie there
                writer = TableWriter(beside)
                threads = detect(with_accelerators=False).threads if size >= _SHARED_FROM_BYTES else 1
                try:
                    reader, tally = _encode_into(writer, wanted, tokenizer, settings, threads, watch)
                finally:
                    writer.close()
                if _state(wanted.path) != before:
                    raise InputError("the file was changed while it was read; begin again", where=wanted.path)
                head = {"format": reader.format, "unit": reader.problems.unit, "tally": tally.as_json()}
                head |= {"path": wanted.path, "sizes": {part.name: part.stat().st_size for part in beside.iterdir()}}
                (beside / _HEAD).write_text(json.dumps(head), encoding="utf-8")
    head = json.loads((folder / _HEAD).read_text(encoding="utf-8"))
    table = TokenTable(folder, wanted.path, head["unit"])
    tally = Tally.from_json(head["tally"])
    tally.refused = [wanted.path + sentence.removeprefix(head["path"]) for sentence in tally.refused]
    return EncodedFile(wanted, head["format"], head["unit"], table, tally, folder)


def _is_whole(folder: Path) -> bool:
    """Whether a table is there with every file as long as it was written."""
    try:
        sizes = json.loads((folder / _HEAD).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def check_file(wanted: Wanted) -> None:
    """Reads a file for what is wrong with it; raises InputError as `encode_file`."""
    reader = wanted.reader()
    for _ in reader:
        pass
    reader.problems.raise_if_any()


def _encode_into(
    writer: TableWriter, wanted: Wanted, tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings,
    processes: int, watch: Watch | None,
) -> tuple[SampleReader, Tally]:  # fmt: skip
    reader, tally = wanted.reader(), Tally()
    for columns, found in encode_samples(_while_sound(reader), tokenizer, settings, processes):
        writer.append({**columns, "number": columns["number"] + np.uint64(tally.samples)})
        tally.add(found)
        if watch is not None:
            watch(f"{wanted.path} as tokens", tally.samples)
    reader.problems.raise_if_any()
    return reader, tally


def _while_sound(reader: SampleReader) -> Iterator[Sample]:
    """The samples up to the first broken record; the rest is read only for what else is broken."""
    for sample in reader:
        if not reader.problems.count:
            yield sample


def bytes_of(path: Path) -> int:
    """Of a file, or of all files in a folder; 0 where there is nothing (who reads it says so)."""
    try:
        return sum(file.stat().st_size for file in _files_of(path))
    except OSError:
        return 0


def _state(path: str) -> list[tuple[str, int, int]]:
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _files_of(Path(path))]


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _name(wanted: Wanted, tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings) -> str:
    """A number of all that decides what the tokens are: the file's bytes, how it is read, tokenizer, and code."""
    digest = hashlib.blake2b(digest_size=20)
    how: dict[str, Any] = {
        "settings": asdict(settings),
        "format": wanted.format,
        "columns": dict(wanted.columns or {}),
        "instruction": wanted.instruction,
        "kind": kind_of(Path(wanted.path)),
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "versions": [importlib.metadata.version(name) for name in _DEPENDENCIES],
    }
    digest.update(json.dumps(how, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for file in _files_of(Path(wanted.path)):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _check_room(folder: Path, size: int) -> None:
    free = disk_free_bytes(folder)
    if free < _DISK_SHARE * size:
        raise DiskFullError(
            f"the tokens of {size / 1e9:.1f} GB of data may take {_DISK_SHARE * size / 1e9:.1f} GB in "
            f"{folder.parent}, where {free / 1e9:.1f} GB are free; remove what you do not need there, or set "
            "FITUNE_CACHE to a folder on another disk"
        )
