"""How much of what the processor can multiply a step uses: for people who watch a run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fitune.fuse.model import FusedModel
from fitune.models.graph import expert_counts, head_name

# Over in a moment; benchmarks/machine_limit.py, which measures the limit itself, takes matrices four times as wide.
SIZE, TIMES = 1024, 9


@dataclass(frozen=True)
class Work:
    """Multiplications and additions of a step's products with weights; attention and all that is none is left out.

    Attributes:
        per_token: of every token of the rows; per_trained_token: of those that go through the output head.
    """

    per_token: int
    per_trained_token: int

    def of(self, tokens: int, trained_tokens: int) -> int:
        """Of a step of so many tokens."""
        return self.per_token * tokens + self.per_trained_token * trained_tokens


def work_of(model: FusedModel, recompute: bool, forwards: int = 1) -> Work | None:
    """Of a step of `model`: a weight costs two operations forward, two for its input's gradient, two for its own.

    `forwards`: passes through it, those of a reference included. None where tokens do not go through all weights
    (mixtures of experts).
    """
    graph = model.graph
    if expert_counts(graph.config):
        return None
    head, per_token, per_trained = head_name(graph), 0, 0
    copies = ".modules_to_save."  # of a module trained whole: it stands for the original, which does not compute
    for name, module in graph.named_modules():
        if name.endswith(".original_module"):
            continue
        name = name.partition(copies)[0]
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        ins, outs = (
            (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        )
        weight = module.weight
        learns = isinstance(weight, torch.Tensor) and weight.requires_grad
        operations = ins * outs * (2 * forwards + 2 + 2 * learns)
        if name == head:
            per_trained += operations
        else:
            per_token += operations + 2 * ins * outs * recompute
    return Work(per_token, per_trained)


class MachineShare:
    """Of steps of one model on this machine, which is measured when it is made."""

    def __init__(self, model: FusedModel, recompute: bool, forwards: int = 1) -> None:
        self._work = work_of(model, recompute, forwards)
        self._rate = product_rate(model.dtype) if self._work is not None else 0.0

    def share(self, tokens: int, trained_tokens: int, seconds: float) -> float | None:
        """Of a step; more than 1 where products in integers are quicker than those in the model's own format."""
        if self._work is None:
            return None
        return round(self._work.of(tokens, trained_tokens) / seconds / self._rate, 4)


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of torch's own product of two large matrices in `dtype`: the quickest of a few.

    Other work beside makes it less than the machine's, and shares more than they are.
    """
    one, other = (torch.full((SIZE, SIZE), 0.5, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - begun)
    return 2 * SIZE**3 / min(seconds)
