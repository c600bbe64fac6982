"""An adapter merged into its 16-bit base: written tensor by tensor, proven before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fitune.atomic import new_folder
from fitune.errors import DiskFullError, FituneError, InputError
from fitune.export.adapter_delta import read_adapter
from fitune.export.merged_tensors import MergedTensors
from fitune.export.trained_beside import TrainedBase
from fitune.export.verify import Comparison, compare_with_adapter
from fitune.models.conversion import GraphTensors
from fitune.models.folder import TOKENIZER_FILES
from fitune.models.graph import build_graph
from fitune.models.shards import plan_shards, write_shards
from fitune.models.source import ModelSource

# Tokenizer and configuration files beside the weights, with room to spare.
_COMPANION_BYTES = 64_000_000


@dataclass(frozen=True)
class MergeReport:
    """What was written.

    Attributes:
        output: the checkpoint folder.
        files: its weight files.
        weight_bytes: their size without headers.
        tensors: how many were written.
        merged_tensors: how many weights of the model the adapter changed.
        tokenizer_from: `adapter` where its folder carries a tokenizer, else `base`.
        comparison: the logits of the written folder against base + adapter.
        note: the base's own note.
    """

    output: Path
    files: list[Path]
    weight_bytes: int
    tensors: int
    merged_tensors: int
    tokenizer_from: str
    comparison: Comparison
    note: str | None


def merge_adapter(
    source: ModelSource,
    adapter_folder: Path,
    output: Path,
    *,
    max_shard_bytes: int = 4_000_000_000,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
    allow_other_base: bool = False,
) -> MergeReport:
    """Writes base + adapter as a Hugging Face checkpoint in the base's own dtype.

    Each adapted weight is W + scaling * B @ A in float32 (its rows as long as DoRA says, where the adapter is one),
    cast once; W is the base's own, or what its 4 bits say where the adapter was begun to make up for them (loftq).
    Names are those of the base's checkpoint; what the adapter does not touch (experts of a mixture, the
    other towers of a multimodal model) is written as it is. The folder is written beside `output`, loaded anew,
    compared with base + adapter through PEFT, and only then takes its name: where anything fails, nothing is left
    and what stood at `output` before still stands.

    Args:
        progress: told the bytes done and the bytes in all.
        overwrite: replace an `output` that is not empty.
        allow_other_base: merge although the adapter names another base (its tensors must still fit).

    Raises:
        InputError: the adapter or the output cannot be used.
        DiskFullError: there is no room.
        FituneError: the written model does not compute what base + adapter compute.
    """
    if max_shard_bytes <= 0:
        raise InputError(f"max_shard_bytes must be positive, found {max_shard_bytes}")
    _check_output(output, overwrite)
    graph = build_graph(source.config, source.config.dtype)
    tensors = GraphTensors(source, graph)
    tensors.check()
    pairs = read_adapter(adapter_folder, source, graph, allow_other_base)
    merged = MergedTensors(source, graph, tensors, pairs, TrainedBase(adapter_folder, graph, tensors))
    weight_bytes = sum(plan.size_bytes for plan in merged.plans)
    _check_disk(output, weight_bytes)
    with new_folder(output, overwrite) as folder:
        paths = write_shards(folder, plan_shards(merged.plans, max_shard_bytes), merged.read, progress)
        if merged.unmerged:
            raise FituneError(f"{len(merged.unmerged)} adapter tensors were not merged, e.g. {merged.unmerged[0]}")
        source.write_companions(folder)
        tokenizer_from = "adapter" if _copy_tokenizer(adapter_folder, folder) else "base"
        comparison = compare_with_adapter(folder, source, adapter_folder, tokenizer_from == "base")
        if not comparison.is_equal:
            raise FituneError(
                "the merged model does not compute what base + adapter compute: its logits differ by "
                f"{comparison.rounding_error:.2e} (allowed {comparison.rounding_tolerance:.1e}), and "
                f"from PEFT's own merge by {comparison.merge_error:.2e} (allowed "
                f"{comparison.merge_tolerance:.1e}); the output was removed"
            )
    return MergeReport(
        output=output,
        files=[output / path.name for path in paths],
        weight_bytes=weight_bytes,
        tensors=len(merged.plans),
        merged_tensors=merged.count,
        tokenizer_from=tokenizer_from,
        comparison=comparison,
        note=source.note,
    )


def _copy_tokenizer(adapter_folder: Path, folder: Path) -> bool:
    """A tokenizer saved with the adapter is the one it was trained with, chat template included: it wins."""
    found = [adapter_folder / name for name in TOKENIZER_FILES if (adapter_folder / name).is_file()]
    if not any(path.name == "tokenizer_config.json" for path in found):
        return False
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return True


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError("not a folder: give a new folder's name", where=output)
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise InputError("is not empty; give another folder, or --overwrite it", where=output)


def _check_disk(output: Path, weight_bytes: int) -> None:
    existing = output.resolve()
    while not existing.exists():
        existing = existing.parent
    needed = weight_bytes + _COMPANION_BYTES
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskFullError(f"{output}: the merged model needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
