"""The store: a model's weights as NF4 with double quantisation, on disk, mapped into memory when used.

A folder in bitsandbytes' own serialised layout, one safetensors file per decoder layer and one for the rest,
with an index; transformers + bitsandbytes load it as it is. `store.json` is the manifest: sizes and hashes of
every file. The folder is complete or not there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fitune.atomic import new_folder, remove_unfinished
from fitune.errors import DiskFullError, FituneError, InputError
from fitune.models.cache import cache_folder, locked
from fitune.models.graph import build_graph, quantised_names
from fitune.models.source import ModelSource
from fitune.quant.nf4 import STATE_KEY, SUFFIXES, NF4Weight, quantise

FORMAT = 1
BITS_PER_WEIGHT = 4.13  # 4 + 8/64 + 32/(64*256), and the headers
MANIFEST = "store.json"
INDEX = "model.safetensors.index.json"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Store:
    """An opened store. Tensors are views into mapped files; they stay valid as long as they are referenced."""

    folder: Path
    manifest: dict[str, Any]
    weight_map: dict[str, str]
    _files: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def quantised(self) -> list[str]:
        """Names of the quantised parameters."""
        return [name.removesuffix(f".{STATE_KEY}") for name in self.weight_map if name.endswith(STATE_KEY)]

    @property
    def plain(self) -> list[str]:
        """Names of the parameters that stayed in 16 or 32 bits."""
        beside = {name for base in self.quantised for name in (base, *(f"{base}.{part}" for part in SUFFIXES))}
        return [name for name in self.weight_map if name not in beside]

    def tensor(self, name: str) -> Tensor:
        """One tensor as it lies in its file."""
        file = self.weight_map[name]
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        result: Tensor = self._files[file].get_tensor(name)
        return result

    def weight(self, name: str) -> NF4Weight:
        """A quantised parameter."""
        parts = {
            tensor: self.tensor(tensor)
            for tensor in (
                name,
                f"{name}.absmax",
                f"{name}.nested_absmax",
                f"{name}.{STATE_KEY}",
            )
        }
        return NF4Weight.from_serialised(name, parts)


def open_store(source: ModelSource, backend: str, progress: Progress | None = None) -> Store:
    """The store of `source`, made first where there is none yet.

    `progress(done, total)` counts tensors while the store is made. Creating is locked against other processes
    and atomic; an existing store is found by the source's fingerprint without reading weights.

    Raises InputError (the model cannot be quantised, or is damaged) or DiskFullError.
    """
    key = hashlib.sha256(f"{source.fingerprint()} nf4 {FORMAT}".encode()).hexdigest()[:20]
    folder = cache_folder() / "stores" / key
    if not (folder / MANIFEST).is_file():
        with locked(folder.with_suffix(".lock")):
            if not (folder / MANIFEST).is_file():
                remove_unfinished(folder)
                _create(source, folder, backend, progress)
    return _open(folder)


def _open(folder: Path) -> Store:
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != entry["bytes"]:
            raise FituneError(
                f"the store {folder} is damaged: {name} has {found} bytes, {entry['bytes']} were written; "
                f"delete the folder and it is made again"
            )
    return Store(folder, manifest, json.loads((folder / INDEX).read_text())["weight_map"])


def _create(source: ModelSource, folder: Path, backend: str, progress: Progress | None) -> None:
    graph = build_graph(source.config, torch.bfloat16)
    quantised = {f"{name}.weight" for name in quantised_names(graph)}
    expected = dict(graph.state_dict(keep_vars=True))
    names = source.tensor_names()
    check_tensors(source, {name: tuple(value.shape) for name, value in expected.items()}, tied=_tied(graph))
    need_bytes = sum(
        int(expected[name].numel() * (BITS_PER_WEIGHT / 8 if name in quantised else 2))
        for name in names
        if name in expected
    )
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < need_bytes * 1.02:
        raise DiskFullError(
            f"the store of {source.reference} takes {need_bytes / 1e9:.2f} GB and {folder.parent} has "
            f"{free_bytes / 1e9:.2f} GB free; free some, or set FITUNE_CACHE to a folder on another disk"
        )
    with new_folder(folder) as beside:
        _write(source, beside, quantised, [name for name in names if name in expected], backend, progress)
        skipped = [name for name, module in graph.named_modules()
                   if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in quantised]  # fmt: skip
        _write_config(source, beside, skipped)
        _write_manifest(source, beside)


def _tied(graph: Any) -> set[str]:
    """Parameters that need not be in a checkpoint because another one is the same tensor."""
    keys = graph._tied_weights_keys if getattr(graph.config, "tie_word_embeddings", False) else None
    return set(keys or ())


def check_tensors(source: ModelSource, expected: dict[str, tuple[int, ...]], tied: set[str]) -> None:
    """Raises one InputError for all tensors of `source` that are missing, unknown or of the wrong shape."""
    names = source.tensor_names()
    have = set(names)
    problems = [f"tensor {name} is missing" for name in expected if name not in have and name not in tied]
    problems += [f"tensor {name} is not part of this architecture" for name in names if name not in expected]
    problems += [
        f"tensor {name} has shape {source.shape(name)}, the configuration wants {expected[name]}"
        for name in names
        if name in expected and source.shape(name) != expected[name]
    ]
    if problems:
        raise InputError(_first(problems), where=source.reference)


def _first(problems: list[str]) -> list[str]:
    return problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])


def _write(
    source: ModelSource, folder: Path, quantised: set[str], names: list[str], backend: str,
    progress: Progress | None,
) -> None:  # fmt: skip
    groups = _by_layer(names)
    weight_map: dict[str, str] = {}
    total_bytes, done = 0, 0
    problems: list[str] = []
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in group:
            value = source.read(name)
            if value.dtype == torch.float32 and value.dim() > 1:
                value = value.to(torch.bfloat16)
            if not bool(torch.isfinite(value).all()):
                problems.append(f"tensor {name} holds values that are not finite")
                continue
            parts = quantise(value, backend).serialised(name) if name in quantised else {name: value}
            tensors.update({key: part.contiguous() for key, part in parts.items()})
            done += 1
            if progress is not None:
                progress(done, len(names))
        if problems:  # nothing will be kept; the rest is read only to name all that is wrong
            continue
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total_bytes += sum(part.numel() * part.element_size() for part in tensors.values())
    if problems:
        raise InputError(_first(problems), where=source.reference)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def _by_layer(names: Iterable[str]) -> list[list[str]]:
    """The rest first, then one group per decoder layer in order."""
    groups: dict[int, list[str]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        groups.setdefault(int(found[1]) if found else -1, []).append(name)
    return [groups[number] for number in sorted(groups)]


def _write_config(source: ModelSource, folder: Path, skipped: list[str]) -> None:
    config = source.config.to_dict()
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }
    config["dtype"] = "bfloat16"
    config.setdefault("architectures", None)
    if not config["architectures"]:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)].__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def _write_manifest(source: ModelSource, folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with open(path, "rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    manifest = {
        "format": FORMAT,
        "reference": source.reference,
        "fingerprint": source.fingerprint(),
        "note": source.note,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
