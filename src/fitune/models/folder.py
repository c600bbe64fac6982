"""A Hugging Face checkpoint folder as a model source: safetensors, read zero-copy from the mapped files."""

from __future__ import annotations

import json
import mmap
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fitune.errors import InputError
from fitune.models.source import Kind, ModelSource

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a folder may hold beside its weights that changes what the model does.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


# Private and writable, because torch wants writable memory; without a reservation, because a file may be larger
# than all memory. Nothing is ever written back.
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, and how it is stored (safetensors' type code)."""

    path: Path
    start_byte: int
    shape: tuple[int, ...]
    code: str


class FolderSource(ModelSource):
    """A folder with config.json and safetensors weights (one file, or shards with their index).

    Raises InputError at construction for a folder whose weights or configuration cannot be used; all problems
    that can be told apart are reported together.
    """

    def __init__(self, folder: Path, reference: str | None = None, kind: Kind = "folder") -> None:
        self.folder = folder
        self.reference = reference or str(folder)
        self.kind = kind
        problems: list[str] = []
        self._weight_files = find_weights(folder, problems)
        self._config = _read_config(folder, problems)
        self._maps: dict[Path, mmap.mmap] = {}
        self._places: dict[str, _Place] = {}
        for path in self._weight_files:
            self._open(path, problems)
        indexed = _index(folder, []) if (folder / INDEX).is_file() else {}
        missing = [name for name in indexed if name not in self._places]
        if missing and not problems:
            problems.append(f"{INDEX} names {len(missing)} tensors that no file holds (first: {missing[0]})")
        self._check_stored_types(problems)
        if problems:
            raise InputError(problems, where=folder)

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

    def _check_stored_types(self, problems: list[str]) -> None:
        odd = [name for name, place in self._places.items() if place.code not in _DTYPES]
        for name in odd[:3]:
            found = self._places[name].code
            problems.append(f"tensor {name} is stored as {found}; {', '.join(_DTYPES)} are read")
        if len(odd) > 3:
            problems.append(f"and {len(odd) - 3} more such tensors")

    @cached_property
    def config(self) -> PretrainedConfig:
        config = self._config
        assert config is not None
        if getattr(config, "dtype", None) is None:
            matrices = [_DTYPES[place.code] for place in self._places.values() if len(place.shape) > 1]
            config.dtype = max(set(matrices), key=matrices.count) if matrices else torch.float32
        return config

    def tensor_names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._places[name].code]

    def read(self, name: str) -> torch.Tensor:
        place, dtype = self._places[name], self.dtype(name)
        if prod(place.shape) == 0:
            return torch.empty(place.shape, dtype=dtype)
        mapped = self._maps[place.path]
        flat = torch.frombuffer(mapped, dtype=dtype, count=prod(place.shape), offset=place.start_byte)
        return flat.reshape(place.shape)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises a dozen kinds here
            raise InputError(f"the tokenizer cannot be read: {_first_line(error)}", where=self.folder) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def generation_config(self) -> GenerationConfig:
        if not (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_model_config(self.config)
        try:
            return GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"generation_config.json: {_first_line(error)}", where=self.folder) from error

    def write_companions(self, folder: Path) -> None:
        # Copied, not saved anew: a newer transformers would rewrite fields that older readers need.
        for path in self._companions():
            shutil.copyfile(path, folder / path.name)

    def files(self) -> list[Path]:
        index = self.folder / INDEX
        return [*self._weight_files, *self._companions(), *([index] if index.is_file() else [])]

    def _companions(self) -> list[Path]:
        return [path for name in COMPANIONS if (path := self.folder / name).is_file()]


def find_weights(folder: Path, problems: list[str]) -> list[Path]:
    """The safetensors files that make up the model."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = _json(folder / "adapter_config.json", []).get("base_model_name_or_path")
        raise InputError(
            f"holds a LoRA adapter, not a model; give its base {base!r} as the model, or merge it first",
            where=folder,
        )
    if (folder / INDEX).is_file():
        shards = sorted({str(shard) for shard in _index(folder, problems).values()})
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            problems.append(f"{len(absent)} of {len(shards)} shards are missing: {', '.join(absent[:4])}; fetch them")
        return [folder / shard for shard in shards if shard not in absent]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        problems.append(f"{len(found)} safetensors files but no {INDEX} that says which tensor lies where")
        return []
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        problems.append(f"no safetensors weights, but GGUF: give the file itself, e.g. {ggufs[0]}")
    elif pickled:
        problems.append(
            f"only pickled weights ({pickled[0].name}), which can run code when read; convert them to "
            "safetensors (transformers: model.save_pretrained) or fetch the model's safetensors"
        )
    else:
        problems.append(f"no weights: neither {SINGLE} nor {INDEX} is there")
    return []


def _index(folder: Path, problems: list[str]) -> dict[str, str]:
    found = _json(folder / INDEX, problems).get("weight_map")
    if not isinstance(found, dict):
        problems.append(f"{INDEX} has no weight_map")
        return {}
    return found


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {_first_line(error)}")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} is not a JSON object")
        return {}
    return found


def _read_config(folder: Path, problems: list[str]) -> PretrainedConfig | None:
    if not (folder / "config.json").is_file():
        problems.append("config.json is missing")
        return None
    before = len(problems)
    written = _json(folder / "config.json", problems)
    if len(problems) > before:
        return None
    version = transformers.__version__
    model_type = written.get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a class of its own validates each family's fields
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            problems.append(_unknown_type(model_type, version))
        else:
            problems.append(f"config.json is refused by transformers {version}: {_first_line(error)}")
        return None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        problems.append(_unknown_type(config.model_type, version))
        return None
    quantisation = written.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        problems.append(f"the weights are already quantised ({method}); give the model in 16 bits")
    return config


def _unknown_type(model_type: object, version: str) -> str:
    return (
        f"model_type {model_type!r} is no causal language model that transformers {version} carries; "
        "code that comes with a model is never run"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
