"""A model whose quantised layers need not all be in memory at one time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fitune.errors import InputError
from fitune.hardware import memory
from fitune.models.wrapped_part import original
from fitune.quant.direct_reads import DirectReads, NoDirectReadsError
from fitune.quant.mapped_pages import MappedPages, give_back, is_mapped, spans_of
from fitune.quant.parameter import QuantisedParameter
from fitune.quant.stream import Carrier, LayerStream, layer_groups

Groups = Sequence[Sequence[QuantisedParameter]]


def stream_layers(
    model: PreTrainedModel, resident_layers: int, carrier: Callable[[Groups], Carrier] | None = None
) -> LayerStream:
    """Has all but `resident_layers` of a model's quantised layers come from its store when they are computed.

    `carrier` brings them: into memory (None: through the system's file cache where it can hold them, or past it), or
    (`StagedCopies`) to a device. Embeddings and head, where they are mapped too, are let go after each use.
    Raises InputError for a model without quantised layers, FituneError where they are not mapped.
    """
    groups = layer_groups(model)
    if not groups:
        raise InputError(
            "is for frozen weights in 4 bits, and this model has none; take method qlora, or leave it out",
            where="train.resident_layers",
        )
    chosen, note = (carrier(groups), None) if carrier else disk_carrier(groups)
    stream = LayerStream(groups, chosen, resident_layers)
    stream.note = note
    spans = spans_of(end_tensors(model))

    def used(*_: Any) -> None:
        give_back(spans)

    stream.end_used = used
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.register_forward_hook(used)
    used()
    return stream


def disk_carrier(groups: Groups) -> tuple[Carrier, str | None]:
    """Through the file cache where the memory that is left can hold all layers; else past it, or why it cannot be."""
    size = sum(tensor.nbytes for group in groups for parameter in group for tensor in parameter.own_tensors())
    _, available = memory()
    if size > available:
        try:
            return DirectReads(groups), None
        except NoDirectReadsError as error:
            return MappedPages(groups), f"they come through it, though it cannot hold them: {error}"
    return MappedPages(groups), None


def end_tensors(model: PreTrainedModel) -> list[Tensor]:
    """The weights of embeddings and head that lie in mapped files."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(original(module), "weight", None) for module in modules if module is not None]
    return [weight.data for weight in weights if isinstance(weight, Tensor) and is_mapped(weight.data)]
