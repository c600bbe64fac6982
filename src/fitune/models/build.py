"""From a source of weights to a model: the transformers graph, with its weights assigned.

QLoRA's linears hold NF4 from the store; LoRA's hold 16-bit weights; full fine-tuning's hold float32 masters.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from fitune.errors import InputError
from fitune.models.conversion import GraphTensors
from fitune.models.graph import (
    LEAST_QUANTISED_SHARE,
    build_graph,
    parameter_dtype,
    set_parameter,
    set_quantised,
    use_plain_experts,
)
from fitune.models.source import ModelSource
from fitune.models.store import Progress, open_store
from fitune.quant.mapped_pages import is_mapped


def build_quantised(
    source: ModelSource, dtype: torch.dtype, backend: str, progress: Progress | None = None,
    least_share: float = LEAST_QUANTISED_SHARE,
) -> PreTrainedModel:  # fmt: skip
    """The model with its matrices in NF4, mapped from its store; head, embeddings and the rest in `dtype`, frozen."""
    store = open_store(source, backend, progress, least_share)
    model = build_graph(source.config, dtype)
    use_plain_experts(model)
    for name in store.quantised:
        set_quantised(model, name, store.weight(name), dtype, backend)
    for target, origin in list(model.all_tied_weights_keys.items()):
        if origin in store.quantised:  # layers that share weights: one NF4 weight, a module for each
            set_quantised(model, target, store.weight(origin), dtype, backend)
            del model.all_tied_weights_keys[target]
    for name in store.plain:
        _set(model, name, store.tensor(name), dtype, trainable=False)
    return _finish(model, source)


def build_dense(source: ModelSource, dtype: torch.dtype, trainable: bool) -> PreTrainedModel:
    """The model with every weight in `dtype`, trainable (full fine-tuning) or frozen (LoRA)."""
    model = build_graph(source.config, dtype)
    tensors = GraphTensors(source, model)
    tensors.check()
    for group in tensors.groups:
        values = tensors.read(group)
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"tensor {name} holds values that are not finite", where=source.reference)
            _set(model, name, value.clone() if trainable else value, dtype, trainable)
        if not any(is_mapped(_get(model, name)) for name in values):  # all are copies
            source.release()
    return _finish(model, source)


def _set(model: PreTrainedModel, name: str, value: torch.Tensor, dtype: torch.dtype, trainable: bool) -> None:
    if value.is_floating_point():
        value = value.to(parameter_dtype(model, name, dtype))
    set_parameter(model, name, value, trainable and value.is_floating_point())


def _get(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A parameter's or buffer's values."""
    owner, _, leaf = name.rpartition(".")
    value: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return value.detach()


def _finish(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    for target, origin in model.all_tied_weights_keys.items():
        # A checkpoint may carry either of two tied tensors.
        if model.get_parameter(origin).is_meta and not model.get_parameter(target).is_meta:
            set_parameter(model, origin, model.get_parameter(target).data)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    left += [name for name, value in model.named_buffers() if value.is_meta]
    if left:
        raise RuntimeError(f"{source.reference}: tensors without values: {', '.join(left[:5])}")
    model.generation_config = source.generation_config()
    model.config.use_cache = False
    return model
