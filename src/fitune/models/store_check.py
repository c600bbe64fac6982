"""Whether a store is what was written: its manifest, the cheap look at every file, and the hashes.

The cheap look (`check_files`) happens whenever a store is opened: a file's size, and of a safetensors file the
header, which must account for every byte and hold the tensors that the index promises. `verify_store` reads
everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fitune.errors import FituneError

MANIFEST = "store.json"
INDEX = "model.safetensors.index.json"
_BLOCK_BYTES = 1 << 22


def read_manifest(folder: Path) -> dict[str, Any]:
    """What was written down when the store was made. Raises FituneError where that cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
            for entry in manifest["files"].values()
        ):
            raise ValueError("it is no manifest of a store")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FituneError(
            f"the store {folder} is damaged: {MANIFEST} cannot be read ({error}); "
            "delete the folder and it is made again"
        ) from error
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the files of a store as far as sizes and headers tell; reads no weights.

    One sentence a problem; an empty list is a store that can be opened.
    """
    problems = [
        problem
        for name, entry in manifest["files"].items()
        if (problem := _size_problem(folder, name, entry["bytes"])) is not None
    ]
    if problems:
        return problems
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        promised: dict[str, set[str]] = {name: set() for name in manifest["files"] if _holds_tensors(name)}
        for tensor, name in weight_map.items():
            promised.setdefault(name, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{INDEX} cannot be read ({error})"]
    for name, tensors in promised.items():
        if name not in manifest["files"]:
            problems.append(f"{INDEX} names {name}, which is not part of the store")
        else:
            problems += _header_problems(folder / name, tensors)
    return problems


def verify_store(folder: Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """What is wrong with a store, every byte of it read and compared with its manifest. Changes nothing.

    `progress(done_bytes, total_bytes)` is called after every few megabytes. One sentence a problem; an empty list
    is a store that is as it was written. Files that are not in the manifest are named too.
    """
    try:
        manifest = read_manifest(folder)
    except FituneError as error:
        return [str(error)]
    files = manifest["files"]
    problems = [f"{name} is not part of the store" for name in _found(folder) if name not in files]
    total_bytes, done_bytes = sum(entry["bytes"] for entry in files.values()), 0
    before = len(problems)
    for name, entry in files.items():
        problem = _size_problem(folder, name, entry["bytes"])
        if problem is None:
            digest = hashlib.sha256()
            try:
                with open(folder / name, "rb") as handle:
                    while block := handle.read(_BLOCK_BYTES):
                        digest.update(block)
                        done_bytes += len(block)
                        if progress is not None:
                            progress(done_bytes, total_bytes)
            except OSError as error:
                problem = f"{name} cannot be read ({error.strerror})"
            else:
                if digest.hexdigest() != entry["sha256"]:
                    problem = f"{name} is not what was written (its SHA-256 is {digest.hexdigest()[:12]}...)"
        else:
            done_bytes += entry["bytes"]
        if problem is not None:
            problems.append(problem)
    return problems if len(problems) > before else problems + check_files(folder, manifest)


def _found(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def _holds_tensors(name: str) -> bool:
    return name.endswith(".safetensors")


def _size_problem(folder: Path, name: str, written_bytes: int) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    found_bytes = path.stat().st_size
    if found_bytes == written_bytes:
        return None
    return f"{name} has {found_bytes} bytes, {written_bytes} were written"


def _header_problems(path: Path, promised: set[str]) -> list[str]:
    """Of one safetensors file: 8 bytes with the header's length, the header as JSON, then the tensors' bytes."""
    try:
        with open(path, "rb") as handle:
            header_bytes = int.from_bytes(handle.read(8), "little")
            if header_bytes > path.stat().st_size - 8:
                return [f"{path.name} has a damaged header (it claims {header_bytes} bytes)"]
            header = json.loads(handle.read(header_bytes))
            header.pop("__metadata__", None)
            end_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return [f"{path.name} has a damaged header ({error})"]
    problems = []
    if 8 + header_bytes + end_bytes != path.stat().st_size:
        problems.append(
            f"{path.name} has {path.stat().st_size} bytes, its header accounts for {8 + header_bytes + end_bytes}"
        )
    missing, extra = sorted(promised - set(header)), sorted(set(header) - promised)
    problems += [f"{path.name} lacks {len(missing)} tensors of {INDEX} (first: {missing[0]})"] if missing else []
    problems += [f"{path.name} holds {len(extra)} tensors unknown to {INDEX} (first: {extra[0]})"] if extra else []
    return problems
