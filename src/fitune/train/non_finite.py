"""Where in a model numbers stop being numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fitune.data.batch import Batch
from fitune.fuse.model import FusedModel
from fitune.step.update import NonFiniteError


def place_of(model: FusedModel, batches: Sequence[Batch], error: NonFiniteError) -> str:
    """A sentence: the first part of the model whose result is not finite, else the first gradient that is not."""
    part = _first_part(model, batches)
    if part is not None:
        return f"the first result that is not finite is that of {part}"
    names = {parameter: name for name, parameter in model.graph.named_parameters()}
    if error.parameter is not None and error.parameter in names:
        return f"the forward pass is finite; the gradient of {names[error.parameter]} is not"
    return "the forward pass is finite now"


def _first_part(model: FusedModel, batches: Sequence[Batch]) -> str | None:
    """The name of the first module, in the order of computing, whose output is not finite; leaves the model alone."""
    found: list[str] = []
    hooks = []
    for name, module in model.graph.named_modules():
        if name:
            hooks.append(module.register_forward_hook(_looking(name, found)))
    was_training = model.graph.training
    model.graph.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in batches:
                if batch.trained_tokens and not found:
                    logprobs, _ = model.logprobs(batch)
                    if not found and not bool(torch.isfinite(logprobs).all()):
                        found.append("the output head")
    finally:
        for hook in hooks:
            hook.remove()
        model.graph.train(was_training)
    return found[0] if found else None


def _looking(name: str, found: list[str]) -> Any:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if not found and isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
            found.append(name)

    return look
