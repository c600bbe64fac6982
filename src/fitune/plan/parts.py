"""Which fused parts the real run will use, found without values by running the cut model on fake tensors.

A real run accepts parts by comparing numbers, which fake tensors have none of. What matters for memory is found by
trying: attention by documents is given up where it refuses the model's arguments, and the loss is computed at the
trained places only where the model does nothing after its decoder but multiply by its head, and scale or cap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.errors import FituneError
from fitune.fuse.head import LogitForm
from fitune.fuse.model import FusedModel
from fitune.models.wrapped_part import in_use

PROBE_TOKENS = 8
_PRODUCTS = {"aten.mm", "aten.addmm", "aten.bmm", "aten.matmul", "aten.linear"}
# Operators that change how a tensor is held, not its values.
_NEUTRAL = {
    "aten.t", "aten.transpose", "aten.view", "aten._unsafe_view", "aten.reshape", "aten.slice", "aten.select",
    "aten.alias", "aten.detach", "aten.expand", "aten.unsqueeze", "aten.squeeze", "aten._to_copy", "aten.clone",
    "aten.permute", "aten.lift_fresh",
}  # fmt: skip
_SCALED = "scaled"


@dataclass(frozen=True)
class Parts:
    """Whether attention goes by documents, and the form of the logits where the loss takes the head by itself."""

    attention: bool
    head: LogitForm | None


def settle_parts(model: FusedModel, plain_attention: str, step: Callable[[], object]) -> Parts:
    """Tries the parts of `model` under the fake mode that is on, and leaves it with those that hold.

    Args:
        plain_attention: transformers' own attention, to go back to.
        step: a forward and backward pass; it is done, once or twice.

    Raises whatever the model raises without fused attention.
    """
    attention = "attention" in model.report.replaced
    head = _logit_form(model)
    use_parts(model, plain_attention, Parts(attention, head))
    try:
        step()
    except (FituneError, RuntimeError, TypeError, ValueError, AttributeError):
        if not attention:
            raise
        attention = False
        use_parts(model, plain_attention, Parts(attention, head))
        step()
    return Parts(attention, head)


def use_parts(model: FusedModel, plain_attention: str, parts: Parts) -> None:
    """Leaves the model with these parts of those it has."""
    replaced = model.report.replaced
    if not parts.attention and replaced.pop("attention", 0):
        model.graph.set_attn_implementation(plain_attention)
    if parts.head is None:
        replaced.pop("head", 0)
    else:
        model.logit_form = parts.head


def _logit_form(model: FusedModel) -> LogitForm | None:
    graph = model.graph
    decoder = graph.get_decoder() if hasattr(graph, "get_decoder") else None
    if decoder is None or decoder is graph or not isinstance(in_use(graph.get_output_embeddings()), nn.Linear):
        return None
    after = _Recorder()

    def ended(module: nn.Module, args: Any, output: Any) -> None:
        after.on = getattr(output, "last_hidden_state", None) is not None

    handle = decoder.register_forward_hook(ended)
    try:
        with torch.no_grad(), after:
            graph(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.int64), use_cache=False)
    except (FituneError, RuntimeError, TypeError, ValueError, AttributeError):
        return None
    finally:
        handle.remove()
    products = [name for name in after.names if name in _PRODUCTS]
    others = [name for name in after.names if name not in _PRODUCTS | _NEUTRAL]
    if len(products) != 1:
        return None
    if not others:
        return LogitForm()
    if set(others) <= {_SCALED}:
        return LogitForm(scale=0.5)  # any other than 1 costs the same
    cap = float(getattr(graph.config.get_text_config(), "final_logit_softcapping", None) or 0.0)
    return LogitForm(cap=cap) if cap and others == [_SCALED, "aten.tanh", _SCALED] else None


class _Recorder(TorchDispatchMode):
    """Names of the operators that run while it is `on`; multiplying and dividing by a number are `_SCALED`."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        factor = args[1] if name in ("aten.mul", "aten.div") else None
        if isinstance(factor, (int, float)):
            name = _SCALED if factor != 1 else "prim.nothing"
        if self.on and not name.startswith("prim."):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
