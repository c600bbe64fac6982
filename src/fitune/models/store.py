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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fitune.atomic import new_folder
from fitune.errors import DiskFullError, FituneError, InputError
from fitune.models.cache import cache_folder, locked, remove_unfinished
from fitune.models.conversion import GraphTensors, Group, first_problems
from fitune.models.graph import LEAST_QUANTISED_SHARE, build_graph, check_quantised_share, quantised_names
from fitune.models.source import ModelSource
from fitune.models.store_check import INDEX, MANIFEST, check_files, read_manifest
from fitune.quant.nf4 import STATE_KEY, SUFFIXES, NF4Weight, quantise

FORMAT = 2
BITS_PER_WEIGHT = 4.13  # 4 + 8/64 + 32/(64*256), and the headers

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


def open_store(
    source: ModelSource, backend: str, progress: Progress | None = None, least_share: float = LEAST_QUANTISED_SHARE
) -> Store:
    """The store of `source`, made first where there is none yet.

    `progress(done, total)` counts tensors while the store is made; a model of which less than `least_share` would be
    quantised is refused. Creating is locked against other processes
    and atomic; an existing store is found by the source's fingerprint without reading weights.

    Raises InputError (the model cannot be quantised, or is damaged) or DiskFullError.
    """
    ready = _ready_made(source)
    if ready is not None:
        return ready
    key = hashlib.sha256(f"{source.fingerprint()} nf4 {FORMAT}".encode()).hexdigest()[:20]
    folder = cache_folder() / "stores" / key
    if not (folder / MANIFEST).is_file():
        with locked(folder.with_suffix(".lock")):
            if not (folder / MANIFEST).is_file():
                remove_unfinished(folder)
                _create(source, folder, backend, progress, least_share)
    return _open(folder)


def _ready_made(source: ModelSource) -> Store | None:
    """The source's own folder as a store, where it holds the graph's very matrices in NF4 under the graph's names."""
    folder = source.quantised_folder()
    if folder is None:
        return None
    graph = build_graph(source.config, torch.bfloat16)
    tensors = GraphTensors(source, graph)
    tensors.check()
    if any(not group.is_renamed_only or (name,) != group.sources for name, group in tensors.by_name.items()):
        return None
    if {name for name in tensors.names if source.nf4(name) is not None} != set(quantised_names(graph)):
        return None
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as handle:
            weight_map.update(dict.fromkeys(handle.keys(), path.name))
    return Store(folder, {}, weight_map)


def _open(folder: Path) -> Store:
    manifest = read_manifest(folder)
    problems = check_files(folder, manifest)
    if problems:
        raise FituneError(
            f"the store {folder} is damaged: {'; '.join(problems)}; delete the folder and it is made again"
        )
    return Store(folder, manifest, json.loads((folder / INDEX).read_text())["weight_map"])


def _create(
    source: ModelSource, folder: Path, backend: str, progress: Progress | None, least_share: float
) -> None:  # fmt: skip
    graph = build_graph(source.config, torch.bfloat16)
    quantised = set(quantised_names(graph))
    check_quantised_share(graph, quantised, least_share)
    tensors = GraphTensors(source, graph)
    tensors.check()
    need_bytes = sum(
        int(prod(tensors.shape(name)) * (BITS_PER_WEIGHT / 8 if name in quantised else 2)) for name in tensors.names
    )
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < need_bytes * 1.02:
        raise DiskFullError(
            f"the store of {source.reference} takes {need_bytes / 1e9:.2f} GB and {folder.parent} has "
            f"{free_bytes / 1e9:.2f} GB free; free some, or set FITUNE_CACHE to a folder on another disk"
        )
    with new_folder(folder) as beside:
        _write(source, tensors, beside, quantised, backend, progress)
        skipped = [name for name, module in graph.named_modules()
                   if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in quantised]  # fmt: skip
        source.write_companions(beside)
        _write_config(source, beside, skipped)
        _write_manifest(source, beside, tensors.unused)


def _write(
    source: ModelSource, tensors: GraphTensors, folder: Path, quantised: set[str], backend: str,
    progress: Progress | None,
) -> None:  # fmt: skip
    layers = _by_layer(tensors)
    wide = _kept_wide(source, tensors)
    weight_map: dict[str, str] = {}
    total_bytes, done, total = 0, 0, len(tensors.names)
    problems: list[str] = []
    for number, groups in enumerate(layers, start=1):
        file = f"model-{number:05d}-of-{len(layers):05d}.safetensors"
        parts: dict[str, Tensor] = {}
        for group in groups:
            for name, value in _values(source, tensors, group, quantised).items():
                if isinstance(value, Tensor):
                    if value.dtype == torch.float32 and name not in wide:
                        value = value.to(torch.bfloat16)
                    if not _is_finite(value):
                        problems.append(f"tensor {name} holds values that are not finite")
                        continue
                    if name in quantised:
                        value = quantise(value, backend)
                made = {name: value} if isinstance(value, Tensor) else value.serialised(name)
                parts.update({key: part.contiguous() for key, part in made.items()})
                done += 1
                if progress is not None:
                    progress(done, total)
            source.release()  # what is not quantised is mapped again when it is saved
        if problems:  # nothing will be kept; the rest is read only to name all that is wrong
            continue
        save_file(parts, folder / file, metadata={"format": "pt"})
        source.release()
        weight_map.update(dict.fromkeys(parts, file))
        total_bytes += sum(part.numel() * part.element_size() for part in parts.values())
    if problems:
        raise InputError(first_problems(problems), where=source.reference)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def _values(
    source: ModelSource, tensors: GraphTensors, group: Group, quantised: set[str]
) -> Mapping[str, Tensor | NF4Weight]:  # fmt: skip
    """A group's graph tensors; as NF4 what the source holds as such, so that its bits stay."""
    if group.is_renamed_only and set(group.targets) <= quantised:
        held = source.nf4(group.sources[0])
        if held is not None:
            return {next(iter(group.targets)): held}
    return tensors.read(group)


def _kept_wide(source: ModelSource, tensors: GraphTensors) -> set[str]:
    """Tensors whose 32 bits are kept: what transformers computes in them, and the vectors of 32-bit models."""
    is_wide = source.config.get_text_config().dtype == torch.float32
    return {
        name for name in tensors.names
        if tensors.stays_wide(name) or (is_wide and len(tensors.shape(name)) < 2)
    }  # fmt: skip


def _is_finite(value: Tensor) -> bool:
    """Whether all values are: NaN and infinities show in the extremes, which take no second tensor."""
    return value.numel() == 0 or bool(torch.isfinite(torch.stack(value.aminmax())).all())


def _by_layer(tensors: GraphTensors) -> list[list[Group]]:
    """The rest first, then the groups of one decoder layer after the other."""
    layers: dict[int, list[Group]] = {}
    for group in tensors.groups:
        found = re.search(r"\.(\d+)\.", next(iter(group.targets)))
        layers.setdefault(int(found[1]) if found else -1, []).append(group)
    return [layers[number] for number in sorted(layers)]


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


def _write_manifest(source: ModelSource, folder: Path, unused: list[str]) -> None:
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
        "unused_tensors": unused,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
