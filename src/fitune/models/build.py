"""From a source of weights to a model: the transformers graph, with its weights assigned.

QLoRA's linears hold NF4 from the store; LoRA's hold 16-bit weights; full fine-tuning's hold float32 masters.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from fitune.errors import InputError
from fitune.models.graph import build_graph, set_parameter
from fitune.models.source import ModelSource
from fitune.models.store import Progress, check_tensors, open_store
from fitune.quant.linear import QuantisedLinear


def build_quantised(
    source: ModelSource, dtype: torch.dtype, backend: str, progress: Progress | None = None
) -> PreTrainedModel:
    """The model with every linear but the head in NF4, mapped from its store; everything else in `dtype`, frozen."""
    store = open_store(source, backend, progress)
    model = build_graph(source.config, dtype)
    for name in store.quantised:
        module_name = name.removesuffix(".weight")
        parent_name, _, leaf = module_name.rpartition(".")
        old = model.get_submodule(module_name)
        bias = store.tensor(f"{module_name}.bias").to(dtype) if old.bias is not None else None
        linear = QuantisedLinear(store.weight(name), bias, backend)
        setattr(model.get_submodule(parent_name), leaf, linear)
    state = dict(model.state_dict(keep_vars=True))
    for name in store.plain:
        if state[name].is_meta or name in dict(model.named_buffers()):
            set_parameter(model, name, store.tensor(name).to(dtype))
    return _finish(model, source)


def build_dense(source: ModelSource, dtype: torch.dtype, trainable: bool) -> PreTrainedModel:
    """The model with every weight in `dtype`, trainable (full fine-tuning) or frozen (LoRA)."""
    model = build_graph(source.config, dtype)
    expected = {name: tuple(value.shape) for name, value in model.state_dict(keep_vars=True).items()}
    tied = model._tied_weights_keys if getattr(source.config, "tie_word_embeddings", False) else None
    check_tensors(source, expected, tied=set(tied or ()))
    for name in source.tensor_names():
        value = source.read(name).to(dtype)
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"tensor {name} holds values that are not finite", where=source.reference)
        set_parameter(model, name, value.clone() if trainable else value, trainable)
    return _finish(model, source)


def _finish(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    left += [name for name, value in model.named_buffers() if value.is_meta]
    if left:
        raise RuntimeError(f"{source.reference}: tensors without values: {', '.join(left[:5])}")
    model.generation_config = source.generation_config()
    model.config.use_cache = False
    return model
