"""The way back from a graph's tensors to those of the checkpoint that they were read from, under its own names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from fitune.errors import FituneError, InputError
from fitune.models.checkpoint_files import first_line
from fitune.models.conversion import Group, checkpoint_tensors
from fitune.models.source import ModelSource


def written_form(
    source: ModelSource, graph: PreTrainedModel, group: Group, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All graph tensors of one group -> the tensors that `source` made them of, under `source.written_name`.

    Tensors on the meta device give shapes and dtypes. Raises InputError where transformers has no way back.
    """
    if group.is_renamed_only:
        (value,) = tensors.values()
        return {source.written_name(group.sources[0]): value}
    try:
        back = checkpoint_tensors(graph, tensors)
    except Exception as error:  # whatever transformers' way back stumbles over
        raise InputError(
            f"{', '.join(group.sources)}: transformers does not turn them back from {', '.join(group.targets)} "
            f"({first_line(error)}), so changed ones cannot be written",
            where=source.reference,
        ) from error
    named = {_own_name(name, group): tensor for name, tensor in back.items()}
    if set(named) != set(group.sources):
        raise FituneError(f"{', '.join(group.sources)} came back as {', '.join(back)}; nothing is written")
    return {source.written_name(name): tensor for name, tensor in named.items()}


def _own_name(name: str, group: Group) -> str:
    """The name that a tensor has in this checkpoint, whose prefix may be another than transformers writes."""
    if name in group.sources:
        return name
    alike = [own for own in group.sources if name.endswith(f".{own}") or own.endswith(f".{name}")]
    return alike[0] if len(alike) == 1 else name
