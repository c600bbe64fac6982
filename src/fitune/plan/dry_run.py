"""Running the real step on a cut-down model: on fake tensors for its memory, on real ones for its time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from fitune.config.schema import RunConfig
from fitune.fuse.model import FusedModel
from fitune.plan.live_bytes import LiveBytes
from fitune.plan.small_model import small_model
from fitune.step.optimizer import make_optimizer

PROBE_STEPS = 3


@dataclass(frozen=True)
class Shape:
    """A micro-batch: rows x tokens, cut into documents of `document_tokens`, with `trained` targets."""

    rows: int
    tokens: int
    document_tokens: int
    trained: int

    def documents(self) -> torch.Tensor:
        """The documents of the rows, as a Batch has them."""
        starts = range(0, self.tokens, self.document_tokens)
        lines = [
            (row, s, min(self.tokens, s + self.document_tokens), 0, 0) for row in range(self.rows) for s in starts
        ]
        return torch.tensor(lines, dtype=torch.int32)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one optimizer step, without the model's own weights.

    Attributes:
        optimizer: states that stay between steps.
        saved: kept from the forward for the backward pass.
        peak: the most at one time, optimizer states included.
        peak_operator: what ran then.
    """

    optimizer: int
    saved: int
    peak: int
    peak_operator: str


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of the parameters, by what becomes of them."""

    frozen: int
    trained: int


def _step(model: FusedModel, optimizer: torch.optim.Optimizer, shape: Shape) -> None:
    _forward(model, shape).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _forward(model: FusedModel, shape: Shape) -> torch.Tensor:
    tokens = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64)
    chosen = torch.arange(1, max(2, shape.trained + 1))
    return -model.logprobs_at(tokens, torch.zeros_like(tokens), shape.documents(), chosen).sum()


def step_memory(
    run: RunConfig, config: PretrainedConfig, layers: int, shape: Shape, dtype: torch.dtype, backend: str
) -> tuple[ModelBytes, StepMemory]:
    """Memory of the second step (the first one makes the optimizer's states) of the model cut to `layers`."""
    model = small_model(run, config, layers, dtype, backend)
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    _make_parameters_fake(model.graph, mode)
    optimizer = make_optimizer(run.train.optimizer, model.trainable, run.train.betas, run.train.weight_decay)
    with mode, live:
        _step(model, optimizer, shape)
        states = live.current
        live.reset_peak()
        loss = _forward(model, shape)
        saved = live.current - states
        loss.backward()
        del loss
        if run.train.accumulation > 1:  # the next micro-batches find the gradients of those before them
            _forward(model, shape).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    trained = sum(p.numel() * p.element_size() for p in model.trainable)
    frozen = sum(p.numel() * p.element_size() for p in model.graph.parameters()) - trained
    return ModelBytes(frozen, trained), StepMemory(states, saved, live.peak, live.peak_operator)


def _make_parameters_fake(graph: nn.Module, mode: FakeTensorMode) -> None:
    """In place; shared parameters stay shared.

    Real ones cannot be given the fake values that bitsandbytes' optimizers write into them.
    """
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module in graph.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    fake = mode.from_tensor(parameter.detach())
                    made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]


def step_seconds(
    run: RunConfig, config: PretrainedConfig, layers: int, shape: Shape, dtype: torch.dtype, backend: str
) -> float:
    """The median time of a step of the model cut to `layers`, on this machine, after one to warm up."""
    model = small_model(run, config, layers, dtype, backend)
    optimizer = make_optimizer(run.train.optimizer, model.trainable, run.train.betas, run.train.weight_decay)
    _step(model, optimizer, shape)
    times = []
    for _ in range(PROBE_STEPS):
        start = time.perf_counter()
        _step(model, optimizer, shape)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
