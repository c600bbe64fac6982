"""From a run file's model settings to a model that trains: build, inject the adapter, fuse."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fitune.adapters.loftq import make_up_for_four_bits
from fitune.adapters.lora import inject, load_adapter
from fitune.adapters.targets import left_without_adapter
from fitune.config.schema import RunConfig
from fitune.data.batch import Batch
from fitune.fuse.adapter_layers import fused_lora_layer
from fitune.fuse.int8_calibration import calibrate
from fitune.fuse.model import FusedModel, prepare
from fitune.models.build import build_dense, build_quantised
from fitune.models.graph import head_name
from fitune.models.source import ModelSource
from fitune.models.store import Progress
from fitune.models.streaming import stream_layers
from fitune.plan.computation import Computation
from fitune.process_memory import give_back_free_memory
from fitune.train.embedding_noise import add_embedding_noise
from fitune.train.run_folder import find_adapter


def build_for_training(
    config: RunConfig, source: ModelSource, computation: Computation, progress: Progress | None = None,
    calibration: Iterable[Batch] = (), is_resumed: bool = False,
) -> FusedModel:  # fmt: skip
    """The model of a run with a fresh adapter (or all weights trainable), in training mode.

    `calibration`: the run's first batches, for a computation in int8; the same ones when the run is resumed.
    `is_resumed`: the adapter's values will be a checkpoint's, so that no work is done for those that it begins with.
    """
    dtype, backend = computation.dtype, computation.backend
    adapted, left = None, {}
    if config.method == "full":
        graph = build_dense(source, torch.float32, trainable=True)
    else:
        graph = (
            build_quantised(source, dtype, backend, progress)
            if config.method == "qlora"
            else build_dense(source, dtype, trainable=False)
        )
        graph.name_or_path = source.reference
        if config.lora.targets == "all-linear":
            left = left_without_adapter(graph, head_name(graph))
        if config.lora.start_from is not None:
            adapted = load_adapter(
                graph, find_adapter(Path(config.lora.start_from)), source.identity(), fused_lora_layer,
                trainable=True, inner=source.graph_module, dropout=config.lora.dropout,
            )  # fmt: skip
        else:
            adapted = inject(
                graph, head_name(graph), rank=config.lora.rank, alpha=config.lora.alpha, dropout=config.lora.dropout,
                targets=config.lora.targets, rslora=config.lora.rslora, seed=config.seed, base_name=source.reference,
                layer=fused_lora_layer, rank_pattern=config.lora.rank_pattern,
                alpha_pattern=config.lora.alpha_pattern, dora=config.lora.dora, whole=config.lora.modules_to_save,
            )  # fmt: skip
            # Columns for int8 are chosen by what the model computes: resumed they must be the same.
            if config.lora.initial == "loftq" and (computation.trains_in_int8 or not is_resumed):
                make_up_for_four_bits(adapted, source, config.seed)
    resident = config.train.resident_layers
    stream = None if resident is None else stream_layers(graph, resident)
    model = prepare(graph, adapted, dtype, backend)
    model.stream = stream
    if stream is not None and stream.note is not None:
        model.report.left["layers read past the file cache"] = stream.note
    model.report.left.update({f"adapter ({layers})": reason for layers, reason in left.items()})
    if config.train.recompute == "layers":
        model.recompute_layers()
    if config.train.neftune_alpha is not None:
        add_embedding_noise(graph, config.train.neftune_alpha)
    graph.train()
    if computation.trains_in_int8:
        calibrate(model, calibration)
    give_back_free_memory()  # of making the store, of the proofs and of calibration
    return model


def build_for_answers(
    source: ModelSource, method: str, computation: Computation, adapter: Path | None = None,
    resident_layers: int | None = None,
) -> FusedModel:  # fmt: skip
    """The model as it was trained, for evaluation and chat: with a saved adapter, or the bare base.

    `resident_layers`: so many layers of a 4-bit base stay in memory (None: all).
    """
    dtype, backend = computation.dtype, computation.backend
    if method == "qlora":
        graph = build_quantised(source, dtype, backend)
    else:
        graph = build_dense(source, dtype, trainable=False)
    graph.name_or_path = source.reference
    adapted = None
    if adapter is not None:
        adapted = load_adapter(graph, adapter, source.identity(), fused_lora_layer, inner=source.graph_module)
    stream = stream_layers(graph, resident_layers) if resident_layers is not None and method == "qlora" else None
    model = prepare(graph, adapted, dtype, backend)
    model.stream = stream
    graph.eval()
    return model
