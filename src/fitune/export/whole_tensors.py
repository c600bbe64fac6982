"""Weights that an adapter has whole (PEFT's `modules_to_save`): in a merged model they stand for the base's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class WholeTensor:
    """A trained weight or bias, of the shape of the base's."""

    values: Tensor

    def merged(self, weight: Tensor) -> Tensor:
        """What is written in place of the base's `weight`, float32."""
        return self.values.float()


def place_whole(found: Mapping[str, Tensor], graph: PreTrainedModel) -> tuple[dict[str, WholeTensor], list[str]]:
    """Names in `graph` -> tensors, and a sentence for each that has no place in it.

    Of weights that are tied in the model both names have the same tensor, for a checkpoint may hold either.
    """
    places: dict[str, WholeTensor] = {}
    problems: list[str] = []
    own = dict(graph.named_parameters(remove_duplicate=False))
    for name, values in found.items():
        if name not in own:
            problems.append(f"tensor {name} is no weight of the model")
        elif tuple(values.shape) != tuple(own[name].shape):
            problems.append(f"{name} is {tuple(values.shape)}, the base's is {tuple(own[name].shape)}")
        elif not bool(torch.isfinite(values).all()):
            problems.append(f"{name} holds values that are not finite")
        else:
            places[name] = WholeTensor(values)
    for one, other in graph.all_tied_weights_keys.items():
        pair = [places.get(one), places.get(other)]
        if pair[0] is None and pair[1] is None:
            continue
        if pair[0] is None or pair[1] is None or not torch.equal(pair[0].values, pair[1].values):
            problems.append(
                f"{one} and {other} are one weight in the model, and two with this adapter (made without "
                "ensure_weight_tying): there is no such checkpoint"
            )
    return places, problems
