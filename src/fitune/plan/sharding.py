"""Weights, gradients and optimizer states spread over several GPUs (ZeRO-3, FSDP): what each holds, what it sends.

Arranged as FSDP does it (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html): each layer is a
unit, gathered before its forward and its backward pass and freed after it, the next one being gathered meanwhile.
What belongs to no layer (embeddings, last norm, head) is gathered once a pass and stays. ZeRO-3 is the same in bytes
(https://arxiv.org/abs/1910.02054, section 7: parameters are gathered twice, gradients reduced and scattered once).
Every GPU has a micro-batch of its own, so activations are not divided. Frozen weights are gathered as they are stored
(NF4 or 16 bit), trained ones of method full in the dtype of the computation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from fitune.adapters.targets import target_ranks
from fitune.config.schema import RunConfig
from fitune.kernels.reference import BLOCK, NESTED_BLOCK
from fitune.models.graph import build_graph, head_name, parameter_dtype, quantised_names
from fitune.plan.anatomy import Anatomy
from fitune.plan.dry_run import StepMemory
from fitune.plan.machines import Machine

UNITS_AT_ONCE = 2  # the layer that computes, and the next


@dataclass(frozen=True)
class Sharding:
    """Bytes on each device.

    Attributes:
        peak_bytes: all there is at the peak.
        shard_bytes: its part of weights, gradients and optimizer states.
        gathered_bytes: weights that are whole at one time.
        unsharded_bytes: what is not divided: activations, workspaces, one layer's gradients, CUDA.
        gather_bytes_per_micro_batch: received by each device to gather weights, twice.
        reduce_bytes_per_micro_batch: received by each device to sum gradients, once.
        bytes_per_step: both, for all micro-batches of an optimizer step.
        fits: whether the peak is within a device's memory.
    """

    peak_bytes: int
    shard_bytes: int
    gathered_bytes: int
    unsharded_bytes: int
    gather_bytes_per_micro_batch: int
    reduce_bytes_per_micro_batch: int
    bytes_per_step: int
    fits: bool


@dataclass(frozen=True)
class Units:
    """Bytes of the weights as they are gathered.

    Attributes:
        root: of what belongs to no layer.
        layers: of each layer.
        layer_gradients: of the largest layer's trained weights, float32.
    """

    root: int
    layers: tuple[int, ...]
    layer_gradients: int

    @property
    def total(self) -> int:
        """Of all weights."""
        return self.root + sum(self.layers)

    @property
    def at_once(self) -> int:
        """The most that is whole at one time."""
        return self.root + sum(sorted(self.layers)[-UNITS_AT_ONCE:])


def shard(
    run: RunConfig, config: PretrainedConfig, anatomy: Anatomy, step: StepMemory, dtype: torch.dtype,
    machine: Machine, process_bytes: int, allocator_share: float,
) -> Sharding:  # fmt: skip
    """The run on `machine.count` devices with everything spread that can be.

    Args:
        step: of one device's micro-batch, dry-run as `sharded`.
        process_bytes: what a process takes of a device.
        allocator_share: of what a step allocates, so much more is reserved.
    """
    count = machine.count
    units = read_units(run, config, anatomy, dtype)
    activations = step.resident - step.optimizer
    divided = anatomy.frozen_bytes + 2 * anatomy.trained_bytes + step.optimizer
    fresh = activations + units.at_once + units.layer_gradients + anatomy.trained_bytes // count
    unsharded = activations + units.layer_gradients + round(allocator_share * fresh) + process_bytes
    peak = -(-divided // count) + units.at_once + unsharded
    gather = 2 * units.total * (count - 1) // count
    reduce = anatomy.trained_bytes * (count - 1) // count
    return Sharding(
        peak, -(-divided // count), units.at_once, unsharded, gather, reduce,
        (gather + reduce) * run.train.accumulation, peak <= machine.memory_bytes,
    )  # fmt: skip


def read_units(run: RunConfig, config: PretrainedConfig, anatomy: Anatomy, dtype: torch.dtype) -> Units:
    """The weights of the whole model by the unit they are gathered in; one unit where it has no list of layers."""
    graph = build_graph(config, dtype)
    quantised = frozenset(quantised_names(graph) if run.method == "qlora" else ())
    prefix = f"{anatomy.layers.path}."
    sizes = [0] * len(anatomy.layers.twins)
    trained = [0] * len(anatomy.layers.twins)
    root = 0

    def add(name: str, size: int, gradient: int = 0) -> None:
        nonlocal root
        if name.startswith(prefix):
            place = int(name.removeprefix(prefix).partition(".")[0])
            sizes[place] += size
            trained[place] += gradient
        else:
            root += size

    for name, parameter in graph.named_parameters():
        elements = parameter.numel()
        if name in quantised:
            blocks = -(-elements // BLOCK)
            add(name, (elements + 1) // 2 + blocks + 4 * -(-blocks // NESTED_BLOCK))
        else:
            learns = run.method == "full" and parameter.is_floating_point()
            held = parameter_dtype(graph, name, dtype) if parameter.is_floating_point() else parameter.dtype
            add(name, elements * held.itemsize, 4 * elements * learns)
    if run.method != "full":
        for name, rank in target_ranks(graph, head_name(graph), run.lora).items():
            adapter = 4 * rank * sum(graph.get_submodule(name).weight.shape)
            add(name, adapter, adapter)
    return Units(root, tuple(sizes), max(trained, default=0))
