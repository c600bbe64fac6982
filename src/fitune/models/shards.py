"""Writing safetensors shards one tensor at a time: memory never holds more than one.

The format (safetensors' README): 8 bytes little-endian header length, a JSON header with each tensor's dtype,
shape and byte range, then the tensors without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from fitune.models.checkpoint_files import CODES

_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Sequence[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Tensors in order, cut into shards; a tensor larger than a shard gets one of its own."""
    shards: list[list[TensorPlan]] = [[]]
    size_bytes = 0
    for tensor in tensors:
        if shards[-1] and size_bytes + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(tensor)
        size_bytes += tensor.size_bytes
    return shards


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[TensorPlan]],
    read: Callable[[str], torch.Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes `model.safetensors`, or numbered shards and their index; each reaches the disk before the next.

    `progress` is told the bytes done and the bytes in all.
    """
    total_bytes = sum(tensor.size_bytes for shard in shards for tensor in shard)
    done_bytes = 0
    weight_map: dict[str, str] = {}
    paths = []
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        for tensor in write_file(folder / name, shard, read):
            weight_map[tensor.name] = name
            done_bytes += tensor.size_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        paths.append(folder / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def write_file(
    path: Path, tensors: Sequence[TensorPlan], read: Callable[[str], torch.Tensor]
) -> Iterator[TensorPlan]:
    """Writes one file, to the disk, while the caller goes through what it gives: each tensor, when it is written."""
    # Wide types first, so that every tensor lies at a multiple of its width.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    with path.open("wb") as file:
        file.write(_header(ordered))
        for tensor in ordered:
            values = read(tensor.name)
            if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name}: planned {tensor}, read {tuple(values.shape)} {values.dtype}")
            file.write(values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del values  # before the next one is read
            yield tensor
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Sequence[TensorPlan]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        fields[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
