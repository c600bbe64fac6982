"""Parquet files, and Arrow files and folders as `datasets` writes them: records with their rows out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fitune.config.schema import SPLITS, STATE
from fitune.data.record import Problems, Record
from fitune.errors import InputError

ROWS_AT_ONCE = 256


def parquet_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Every row of a Parquet file."""
    pyarrow = pyarrow_for(path)
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE)
            yield from _rows(batches, 0)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot be read as Parquet: {_first_line(error)}", where=path) from None


def arrow_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Every row of an .arrow file, or of the files of a folder that `datasets` saved.

    Raises:
        InputError: it is another folder, one of several splits, or a selection of rows that was not written out.
    """
    row = 0
    for file in _arrow_files(path):
        for record in _arrow_file(file, row):
            row = record.line
            yield record


def is_saved_by_datasets(path: Path) -> bool:
    """Whether a folder is what `datasets`' save_to_disk makes."""
    return (path / STATE).is_file() or (path / SPLITS).is_file()


def _arrow_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / SPLITS).is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / STATE).is_file())
        raise InputError(
            f"the folder holds several splits ({', '.join(splits) or 'none of them complete'}); name one, such as "
            f"{path / (splits or ['train'])[0]}",
            where=path,
        )
    state = _json(path / STATE)
    if state.get("_indices_data_files"):
        raise InputError(
            "the folder holds a selection of rows; write them out with dataset.flatten_indices() before save_to_disk",
            where=path,
        )
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise InputError(f"{STATE} names no data files (_data_files)", where=path) from None
    files = [path / str(name) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{', '.join(missing)} is missing, which {STATE} names", where=path)
    return files


def _arrow_file(path: Path, row: int) -> Iterator[Record]:
    """`datasets` writes Arrow's stream format, others its file format."""
    pyarrow = pyarrow_for(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            yield from _rows(batches, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot be read as Arrow: {_first_line(error)}", where=path) from None


def _rows(batches: Any, row: int) -> Iterator[Record]:
    for batch in batches:
        batch.validate(full=True)  # offsets of a damaged file lead anywhere in memory
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for value in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                row += 1
                yield Record(row, value)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", where=path) from None
    if not isinstance(found, dict):
        raise InputError("is not what `datasets` writes", where=path)
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def pyarrow_for(path: Path) -> Any:
    """The package, or InputError on how to get it."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "is a Parquet or Arrow file, for which the package pyarrow is missing; run: pip install 'fitune[data]'",
            where=path,
        ) from None
    return pyarrow
