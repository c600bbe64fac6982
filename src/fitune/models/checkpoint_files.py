"""The tensors of a checkpoint's files as they lie there: safetensors and pickled files, both mapped."""

from __future__ import annotations

import json
import mmap
import re
import sys
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fitune.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"

# safetensors' type codes (https://github.com/huggingface/safetensors, "Format").
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
CODES = {dtype: code for code, dtype in DTYPES.items()}

# Private and writable, because torch wants writable memory; without a reservation, because a file may be larger
# than all memory. Nothing is ever written back.
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class CheckpointTensors(ABC):
    """Named tensors that are read one at a time, and only when asked for."""

    @abstractmethod
    def names(self) -> list[str]:
        """In the order of the files."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor. Raises KeyError for a name that is not there."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read(name)` will have."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor on the CPU; it may be a view of the mapped file: copy it before writing to it."""

    def release(self) -> None:  # noqa: B027 - others hold nothing
        """As `ModelSource.release`."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, and how it is stored (safetensors' type code)."""

    path: Path
    start_byte: int
    shape: tuple[int, ...]
    code: str


class SafetensorsFiles(CheckpointTensors):
    """Safetensors files, mapped. What is wrong with them is added to `problems`."""

    def __init__(self, paths: list[Path], problems: list[str]) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._places: dict[str, _Place] = {}
        for path in paths:
            self._open(path, problems)
        odd = [name for name, place in self._places.items() if place.code not in DTYPES]
        for name in odd[:3]:
            problems.append(f"tensor {name} is stored as {self._places[name].code}, which torch cannot hold here")
        if len(odd) > 3:
            problems.append(f"and {len(odd) - 3} more such tensors")

    def _open(self, path: Path, problems: list[str]) -> None:
        try:
            # The library checks the header against the file; numpy's flavour maps nothing that counts as memory.
            with safe_open(path, framework="np"):
                pass
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes))
                self._maps[path] = mmap.mmap(file.fileno(), 0, flags=_MAP_FLAGS)
        except (SafetensorError, OSError, ValueError) as error:
            size = path.stat().st_size if path.is_file() else 0
            problems.append(f"{path.name} is cut short or damaged ({size} bytes, {error}); fetch it again")
            return
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self._places:
                problems.append(f"tensor {name} is in both {self._places[name].path.name} and {path.name}")
            start = 8 + header_bytes + entry["data_offsets"][0]
            self._places[name] = _Place(path, start, tuple(entry["shape"]), entry["dtype"])

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._places[name].code]

    def read(self, name: str) -> Tensor:
        place, dtype = self._places[name], self.dtype(name)
        if prod(place.shape) == 0:
            return torch.empty(place.shape, dtype=dtype)
        mapped = self._maps[place.path]
        flat = torch.frombuffer(mapped, dtype=dtype, count=prod(place.shape), offset=place.start_byte)
        return flat.reshape(place.shape)

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # nothing is ever written to a map, so nothing is lost
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)


class PickledFiles(CheckpointTensors):
    """Files written by `torch.save`, read by torch's loader that accepts tensors only, and mapped.

    What is wrong with them, and what that loader refuses, is added to `problems`.
    """

    def __init__(self, paths: list[Path], problems: list[str]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path in paths:
            self._load(path, problems)

    def _load(self, path: Path, problems: list[str]) -> None:
        if not zipfile.is_zipfile(path):
            problems.append(
                f"{path.name} is cut short, or in the form that torch wrote before 1.6; fetch it again, or save it "
                "anew with torch.save(torch.load(FILE, weights_only=True), FILE)"
            )
            return
        try:
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # its own kind where it refuses something, a dozen others for a damaged file
            if type(error).__name__ == "UnpicklingError":
                problems.append(_refusal(path, error))
            else:
                problems.append(f"{path.name} is damaged ({first_line(error)}); fetch it again")
            return
        if not isinstance(found, dict):
            problems.append(f"{path.name} holds a {type(found).__name__}, not a model's tensors by name")
            return
        odd = [f"{name!r} ({type(value).__name__})" for name, value in found.items() if not isinstance(value, Tensor)]
        if odd:
            problems.append(
                f"{path.name} holds things that are not tensors: {', '.join(odd[:4])}; it is a training checkpoint, "
                "not a model: save the model's state dict alone"
            )
            return
        for name, tensor in found.items():
            if name in self._tensors:
                problems.append(f"tensor {name} is in {path.name} and in another file")
            self._tensors[name] = tensor

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().contiguous()

    def is_same_memory(self, first: str, second: str) -> bool:
        """Whether two names stand for one tensor in the file (a tied output head)."""
        left, right = self._tensors[first], self._tensors[second]
        return left.data_ptr() == right.data_ptr() and left.shape == right.shape and left.stride() == right.stride()


def _refusal(path: Path, error: Exception) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"it wants to run {named[1]} when it is read" if named else first_line(error)
    return (
        f"{path.name} is refused: {what}, and fitune never unpickles anything but tensors; fetch the model's "
        "safetensors, or convert the file where you trust it: safetensors.torch.save_file(torch.load(FILE, "
        f"weights_only=False), '{SINGLE}')"
    )


def open_files(paths: list[Path], problems: list[str]) -> CheckpointTensors:
    """The tensors of files that `find_weights` found."""
    if any(path.suffix == ".bin" for path in paths):
        return PickledFiles(paths, problems)
    return SafetensorsFiles(paths, problems)


def find_weights(folder: Path, problems: list[str]) -> list[Path]:
    """The files that make up the model: safetensors, else pickled ones that torch may read without running code."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / "adapter_config.json", []).get("base_model_name_or_path")
        raise InputError(
            f"holds a LoRA adapter, not a model; give its base {base!r} as the model, or merge it first",
            where=folder,
        )
    if (folder / INDEX).is_file():
        return _shards(folder, INDEX, problems)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        problems.append(f"{len(found)} safetensors files but no {INDEX} that says which tensor lies where")
        return []
    if (folder / PICKLED_INDEX).is_file():
        return _shards(folder, PICKLED_INDEX, problems)
    if (folder / PICKLED_SINGLE).is_file():
        return [folder / PICKLED_SINGLE]
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        problems.append(f"no safetensors weights, but GGUF: give the file itself, e.g. {ggufs[0]}")
    elif pickled:
        problems.append(
            f"only pickled weights that no convention names ({pickled[0].name}); {PICKLED_SINGLE} and "
            f"{PICKLED_INDEX} are read: convert them to safetensors (transformers: model.save_pretrained)"
        )
    else:
        problems.append(f"no weights: neither {SINGLE} nor {INDEX} is there")
    return []


def find_index(folder: Path, weight_files: list[Path]) -> Path | None:
    """The index that names `weight_files`, where there is one."""
    index = folder / (PICKLED_INDEX if any(path.suffix == ".bin" for path in weight_files) else INDEX)
    return index if index.is_file() else None


def indexed_names(index: Path, problems: list[str]) -> dict[str, str]:
    """Tensor name -> file name."""
    found = read_json(index, problems).get("weight_map")
    if not isinstance(found, dict):
        problems.append(f"{index.name} has no weight_map")
        return {}
    return found


def _shards(folder: Path, index: str, problems: list[str]) -> list[Path]:
    shards = sorted({str(shard) for shard in indexed_names(folder / index, problems).values()})
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        problems.append(f"{len(absent)} of {len(shards)} shards are missing: {', '.join(absent[:4])}; fetch them")
    return [folder / shard for shard in shards if shard not in absent]


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object, or an empty one and a problem."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {first_line(error)}")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} is not a JSON object")
        return {}
    return found


def first_line(error: Exception) -> str:
    """The first line of what an exception says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
