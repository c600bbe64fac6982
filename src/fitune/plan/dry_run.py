"""Running the real step on a cut-down model: on fake tensors for its memory, on real ones for its time.

The model is cut to its first layers that show every kind of layer it has; `layer_watch` puts the whole together.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from transformers import PretrainedConfig

from fitune.config.schema import RunConfig
from fitune.errors import FituneError
from fitune.fuse.model import FusedModel
from fitune.kernels.rooms import Rooms, a_pass, rooms
from fitune.plan.anatomy import WHOLE, Anatomy, Layers
from fitune.plan.device_workspaces import DeviceWorkspaces
from fitune.plan.even_routing import EvenRouting
from fitune.plan.layer_watch import LayerWatch, even_out, layer_modules
from fitune.plan.live_bytes import LiveBytes, Stretch, Stretches
from fitune.plan.parts import Parts, settle_parts, use_parts
from fitune.plan.small_model import small_model
from fitune.step.fresh_states import FRESH
from fitune.step.objective import objective_of
from fitune.step.optimizer import make_optimizer
from fitune.step.paged_gradients import SLICE
from fitune.step.paged_optimizer import paged_bytes

# Of a gradient, a scaled one, two moments.
UPDATE_SLICES = 4
# Of what a pass saves on the heap, so much is resident beside what takes its place: 0.34 to 0.68 in six runs of full
# fine-tuning (docs/log.md, "rooms in the plan"). Gradients do not fit the gaps that saved tensors leave.
HOLES = 0.45
PROBE_STEPS = 3
PROBE_SECONDS = 10.0
PROBE_LAYERS = 5  # so many at least, that what one layer costs stands out from the noise


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
        optimizer: states that stay in memory between steps.
        saved: kept from the forward for the backward pass.
        peak: the most alive at one time, optimizer states included.
        resident: the most that memory is held for at one time; on the CPU more than is alive.
        resident_operator: what ran then.
        in_rooms: what of it the native kernels' results lie in.
        at_head: the most that is held until the logits are done; `resident` is of all of the step.
        parts: the fused parts it was measured with.
        disk: optimizer states and gradients that lie in a file.
    """

    optimizer: int
    saved: int
    peak: int
    resident: int
    resident_operator: str
    parts: Parts
    in_rooms: int = 0
    at_head: int = 0
    disk: int = 0


def _loss(model: FusedModel, shape: Shape) -> torch.Tensor:
    ordinary = model.graph.get_input_embeddings().weight.shape[0] // 3  # special tokens lie at a vocabulary's ends
    with unset_fake_temporarily():  # real, so that a forward may look at its tokens
        tokens = torch.full((shape.rows, shape.tokens), ordinary)
    chosen = torch.arange(1, max(2, shape.trained + 1))
    return -model.logprobs_at(tokens, torch.zeros_like(tokens), shape.documents(), chosen).sum()


def step_memory(
    run: RunConfig, config: PretrainedConfig, anatomy: Anatomy, shape: Shape, dtype: torch.dtype, backend: str,
    device: DeviceWorkspaces | None = None,
) -> StepMemory:  # fmt: skip
    """Memory of the second step (the first one makes the optimizer's states) of the whole model.

    `device`: what operators take there beside their results; None: nothing.

    Mixtures of experts are taken to be routed evenly. Raises FituneError for a model whose forward asks for values.
    """
    try:
        found = _dry_run(run, config, anatomy, anatomy.layers, shape, dtype, backend, device)
        # Where layers do not follow one another the whole model is run.
        found = found or _dry_run(run, config, anatomy, WHOLE, shape, dtype, backend, device)
    except (DynamicOutputShapeException, DataDependentOutputException, UnsupportedOperatorException) as error:
        raise FituneError(
            f"the memory of a {config.model_type} model cannot be planned: its forward asks for values, and a dry "
            f"run has none ({type(error).__name__}: {error}); `fitune train` can still train it"
        ) from error
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FituneError(
            f"the memory of a {config.model_type} model cannot be planned: a {run.method} step of it in "
            f"{str(dtype).removeprefix('torch.')} fails ({type(error).__name__}: {error})"
        ) from error
    assert found is not None
    return found


def _dry_run(
    run: RunConfig, config: PretrainedConfig, anatomy: Anatomy, layers: Layers, shape: Shape, dtype: torch.dtype,
    backend: str, device: DeviceWorkspaces | None = None,
) -> StepMemory | None:  # fmt: skip
    """None where nothing can be concluded from the layers kept."""
    model, plain_attention = small_model(run, config, layers, dtype, backend, filled=False)
    mode, own_rooms = FakeTensorMode(allow_non_fake_inputs=True), Rooms(lambda size: object())
    live = LiveBytes(own_rooms if device is None and backend == "native" else None)
    make_parameters_fake(model.graph, mode)
    optimizer = make_optimizer(run.train.optimizer, model.trainable, run.train.betas, run.train.weight_decay, backend)
    paged = run.train.optimizer_states == "disk"
    if paged:
        _drop_gradients(model.trainable)
    watch = LayerWatch(layer_modules(model.graph, layers), live.stretches)
    with mode, EvenRouting(anatomy.expert_counts), live, device or nullcontext():
        parts = settle_parts(model, plain_attention, lambda: watch.run(lambda: _loss(model, shape)))
        _update(optimizer)  # where there are no gradients it makes no states
        states = live.current + _missing_states_bytes(optimizer, anatomy)
        if device is not None and device.sharded:
            _drop_gradients(model.trainable)
        own_rooms.clear()
        live.reset_peak()
        passes = []
        for _ in range(min(run.train.accumulation, 2)):  # later micro-batches find the gradients of those before
            found = watch.run(lambda: _loss(model, shape))
            whole = found.whole(layers)
            if whole is None:
                return None
            passes.append(_Passes(*whole, [stretches for _, stretches in found.forward]))
        _update(optimizer)
        update = live.stretches()
    saved = sum(stretch.all.change for stretch in passes[0].forward)
    peak, operator = _highest(states, [*(one.all for p in passes for one in (*p.forward, *p.backward)), update.all])
    held, held_operator, in_rooms, at_head = peak, operator, 0, peak
    if device is None:
        in_rooms = own_rooms.held_bytes + _further(passes[0])
        on_heap = [one.outside for passed in passes for one in (*passed.forward, *passed.backward)]
        outside, held_operator = _highest(states, [*on_heap, update.outside])
        until_logits, _ = _highest(states, on_heap[: len(on_heap) - len(passes[-1].backward) + 1])
        holes = round(HOLES * sum(one.outside.change for one in passes[0].forward))
        held, at_head = in_rooms + outside + holes, in_rooms + until_logits + holes
    disk = 0
    if paged:
        # A slice of a gradient on its way to the file; and, when nothing else is there, slices of all of the update.
        slice_bytes = 4 * min(SLICE, max(prod(shape) for shape in anatomy.trained))
        peak, held = (max(value + slice_bytes, UPDATE_SLICES * slice_bytes) for value in (peak, held))
        disk = _on_disk_bytes(run, anatomy)
    return StepMemory(states, saved, peak, held, held_operator, parts, in_rooms, at_head, disk)


@dataclass(frozen=True)
class _Passes:
    """A micro-batch's stretches: of the whole model, and of the layers that were kept of it."""

    forward: list[Stretches]
    backward: list[Stretches]
    kept_forward: list[Stretches]


def _further(passes: _Passes) -> int:
    """Of rooms that layers need beyond those that were run: each has what it saves; the rest is used again."""
    return sum(one.in_rooms.change for one in passes.forward) - sum(
        one.in_rooms.change for one in passes.kept_forward
    )


def _on_disk_bytes(run: RunConfig, anatomy: Anatomy) -> int:
    return sum(
        count * paged_bytes(FRESH[run.train.optimizer], [torch.empty(shape, dtype=torch.float32, device="meta")])
        for shape, count in anatomy.trained.items()
    )


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    """Has every gradient freed as soon as it is there, as one on disk, or sent to the devices that keep its parts."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(drop)


def _missing_states_bytes(optimizer: torch.optim.Optimizer, anatomy: Anatomy) -> int:
    """What the optimizer keeps for the trained tensors of the whole model that this cut one lacks."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    storages = [
        [
            value.untyped_storage()
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, torch.Tensor)
        ]
        for parameter in parameters
    ]
    users = Counter(storage._cdata for own in storages for storage in own)  # tables are shared by all
    have = Counter(tuple(parameter.shape) for parameter in parameters)
    bytes_of: Counter[tuple[int, ...]] = Counter()  # a tensor that never gets a gradient has no states
    for parameter, own in zip(parameters, storages, strict=True):
        bytes_of[tuple(parameter.shape)] += sum(storage.nbytes() for storage in own if users[storage._cdata] == 1)
    missing = anatomy.trained - have
    return sum(bytes_of[shape] * count // have[shape] for shape, count in missing.items())


def _highest(start: int, stretches: list[Stretch]) -> tuple[int, str]:
    """The most bytes alive at one time, and what ran then, where the stretches follow one another."""
    current, peak, operator = start, start, ""
    for stretch in stretches:
        if current + stretch.rise > peak:
            peak, operator = current + stretch.rise, stretch.operator
        current += stretch.change
    return peak, operator


def make_parameters_fake(graph: nn.Module, mode: FakeTensorMode) -> None:
    """In place; shared parameters stay shared.

    Real ones cannot be given the fake values that some optimizers write into them.
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


def probe_bytes(anatomy: Anatomy, step: StepMemory, layers: int) -> int:
    """What the probe of so many layers holds, all of them in memory."""
    whole = max(1, len(anatomy.layers.twins))
    in_layers = sum(anatomy.layer_bytes)
    of_layers = in_layers + anatomy.int8_bytes + 2 * anatomy.trained_bytes + step.optimizer + step.saved
    rest = anatomy.frozen_bytes - in_layers + step.resident - step.optimizer - step.saved
    return rest + of_layers * min(layers, whole) // whole


def step_seconds(
    run: RunConfig, config: PretrainedConfig, anatomy: Anatomy, shape: Shape, dtype: torch.dtype, backend: str,
    parts: Parts, probed_layers: int = PROBE_LAYERS,
) -> float:  # fmt: skip
    """The time of a step of the whole model on this machine: the median of a few steps after one to warm up.

    `parts` are those that the dry run found; so many layers are run, or more where fewer do not show every kind.
    Optimizer states on disk are taken to cost what they cost in memory, and layers that come from there nothing.

    Where steps are long, fewer are taken; one that is longer than PROBE_SECONDS counts by itself.
    """
    layers = anatomy.layers.with_at_least(probed_layers)
    found = _probe(run, config, anatomy, layers, shape, dtype, backend, parts)
    found = found or _probe(run, config, anatomy, WHOLE, shape, dtype, backend, parts)
    assert found is not None
    return found


def _probe(
    run: RunConfig, config: PretrainedConfig, anatomy: Anatomy, layers: Layers, shape: Shape, dtype: torch.dtype,
    backend: str, parts: Parts,
) -> float | None:  # fmt: skip
    model, plain_attention = small_model(run, config, layers, dtype, backend)
    use_parts(model, plain_attention, parts)
    optimizer = make_optimizer(run.train.optimizer, model.trainable, run.train.betas, run.train.weight_decay, backend)
    share = anatomy.trained_elements / sum(parameter.numel() for parameter in model.trainable)
    clock = _Clock()
    watch = LayerWatch(layer_modules(model.graph, layers), clock.lap)
    times: list[float] = []
    spent = 0.0
    while len(times) <= PROBE_STEPS and spent < PROBE_SECONDS:
        clock.lap()
        start = clock.now
        with a_pass():
            passes = even_out(watch.run(lambda: _loss(model, shape)), layers).whole(layers)
            if passes is None:
                return None
            _update(optimizer)
        updated = clock.lap()
        # The base's passes and others before a step keep nothing: its own exceeds their memory.
        forwards = objective_of(run.train.objective, run.train.beta).forwards
        times.append(forwards * sum(passes[0]) + sum(passes[1]) + share * updated)
        spent += clock.now - start
    rooms.clear()
    measured = times[1:] or times
    return sorted(measured)[len(measured) // 2]


class _Clock:
    """Seconds between calls."""

    def __init__(self) -> None:
        self.now = time.perf_counter()

    def lap(self) -> float:
        """Since the last call."""
        before, self.now = self.now, time.perf_counter()
        return self.now - before
