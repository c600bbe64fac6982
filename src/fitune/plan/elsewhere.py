"""The plan of a run on a machine that is not this one: a GPU, several, or a CPU with other memory.

For a CPU it is this machine's plan with another size of memory. For a GPU the same step is dry-run with backend
"reference", and what the kernels of a GPU take while they run is added (`device_workspaces` says what, and why no
score matrix is in it). The rest is put together as a GPU has it: weights as they are stored (NF4, or the dtype of the
computation), adapters and their states in float32, and what CUDA itself takes.

Full fine-tuning keeps float32 weights there too, computed in bfloat16 by autocast: 4 bytes a parameter for the
weight, 4 for its gradient, 8 for AdamW's two moments, and 2 for the copy in bfloat16 that the backward pass wants
(with recomputation for one layer at a time). Recipes in pure bfloat16 take half of it, 2 + 2 + 4, and lose every
update that is smaller than half a bfloat16's last bit (0.2 % of a weight).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.hardware import detect
from fitune.plan.anatomy import Anatomy, read_anatomy
from fitune.plan.computation import choose_computation
from fitune.plan.device_workspaces import DeviceWorkspaces
from fitune.plan.dry_run import StepMemory, step_memory
from fitune.plan.levers import Choice
from fitune.plan.machines import Machine
from fitune.plan.planner import RUN_BYTES, Item, Plan, Workload, make_plan, parts_at_peak, resolved_settings, shape_of
from fitune.plan.sharding import Sharding, shard
from fitune.process_memory import resident_bytes

# What a process takes of a GPU before its first tensor: about 400 MB since kernels are loaded when first used
# (CUDA 11.7), https://github.com/pytorch/pytorch/issues/109888.
CUDA_CONTEXT_BYTES = 400_000_000
# What cuBLAS is given: 32 MiB on Hopper, 4 MiB on large older cards, https://github.com/pytorch/pytorch/pull/120925.
BLAS_WORKSPACE_BYTES = 32 << 20
# Of what is allocated anew in every step, so much more is reserved for it and lies in holes. With expandable
# segments; without them it may be half as much again (https://github.com/meta-pytorch/torchtune/issues/1185). 5 % is
# what https://github.com/vllm-project/compressed-tensors/pull/587 sets aside after having met 2.4 % of all memory.
ALLOCATOR_SHARE = 0.05

NO_TIME_CPU = "Time is not known: it is measured by running, and that machine is not here."
NO_TIME_GPU = "Of fitune's own step with the kernels of a GPU, not measured on one; its time is not known."


@dataclass(frozen=True, kw_only=True)
class ElsewherePlan(Plan):
    """A plan for a machine that is not this one.

    Attributes:
        machine: for which it is; `available_bytes` is the memory of each of its devices.
        sharding: the other way to use several devices; None for one.
        notes: sentences that belong to the numbers.
    """

    machine: Machine
    sharding: Sharding | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class GpuMemory:
    """What a step takes on each of a machine's GPUs when every one holds everything.

    Attributes:
        step: of the dry run, workspaces included.
        largest_decoded: bytes of the largest decoded NF4 weight.
    """

    anatomy: Anatomy
    step: StepMemory
    largest_decoded: int

    @property
    def allocator_bytes(self) -> int:
        """Reserved beside what is in use."""
        return round(ALLOCATOR_SHARE * (self.step.resident - self.step.optimizer))

    @property
    def peak_bytes(self) -> int:
        """All there is on the card at the peak."""
        weights = self.anatomy.frozen_bytes + self.anatomy.trained_bytes
        return weights + self.step.resident + self.allocator_bytes + CUDA_CONTEXT_BYTES + BLAS_WORKSPACE_BYTES


def plan_for(
    run: RunConfig, model: str, config: PretrainedConfig, machine: Machine, workload: Workload, learning_rate: float,
    choices: tuple[Choice, ...] = (), budget_bytes: int | None = None,
) -> Plan:  # fmt: skip
    """The plan of a run on `machine`; without times. An `ElsewherePlan`.

    `choices`: what of it was chosen (chosen_elsewhere.py) to stay within `budget_bytes`.

    On several GPUs every one takes a micro-batch of its own and holds everything (data parallelism); `sharding` says
    what it takes when weights, gradients and states are spread.

    Raises InputError for settings that a GPU has not, FituneError for a model whose step cannot be dry-run.
    """
    if run.train.resident_layers is not None and machine.kind == "gpu":
        raise InputError("layers come from the disk on a CPU only; leave it out", where="train.resident_layers")
    if machine.kind == "cpu":
        return _plan_on_cpu(run, model, config, machine, workload, learning_rate, choices, budget_bytes)
    dtype, reason = gpu_dtype(run, machine)
    memory = gpu_memory(run, config, workload, dtype)
    anatomy, step = memory.anatomy, memory.step
    gradients, saved, workspace = parts_at_peak(step, step.resident, anatomy.trained_bytes)
    decoded = min(memory.largest_decoded, workspace) if "frozen_product" in step.resident_operator else 0
    items = (
        Item("frozen weights", anatomy.frozen_bytes, "bytes", "model"),
        Item("trained weights", anatomy.trained_bytes, "bytes", "derived"),
        Item("gradients", gradients, "bytes", "derived"),
        Item("optimizer states", step.optimizer, "bytes", "dry run"),
        Item("saved activations", saved, "bytes", "dry run"),
        *((Item("decoded NF4 weight", decoded, "bytes", "derived"),) if decoded else ()),
        Item("workspaces, logits", workspace - decoded, "bytes", "dry run"),
        Item("allocator's holes", memory.allocator_bytes, "bytes", "published"),
        Item("CUDA context, cuBLAS", CUDA_CONTEXT_BYTES + BLAS_WORKSPACE_BYTES, "bytes", "published"),
    )
    settings = (
        *resolved_settings(run, workload, learning_rate, {choice.setting for choice in choices}),
        Item("computation", reason, "", "machine"),
        Item("devices", machine.count, "", "you"),
    )
    sharding = sharding_on(machine, run, config, workload) if machine.count > 1 else None
    return ElsewherePlan(
        model, run.method, memory.peak_bytes, machine.memory_bytes, None, None, step.resident_operator, items,
        settings, choices, budget_bytes, machine=machine, sharding=sharding,
        notes=tuple(_gpu_notes(run, anatomy, machine)),
    )  # fmt: skip


def sharding_on(machine: Machine, run: RunConfig, config: PretrainedConfig, workload: Workload) -> Sharding:
    """A run with weights, gradients and states spread over `machine.count` GPUs. Raises as `plan_for` does."""
    dtype = gpu_dtype(run, machine)[0]
    memory = gpu_memory(run, config, workload, dtype, sharded=True)
    process_bytes = CUDA_CONTEXT_BYTES + BLAS_WORKSPACE_BYTES
    return shard(run, config, memory.anatomy, memory.step, dtype, machine, process_bytes, ALLOCATOR_SHARE)


def gpu_dtype(run: RunConfig, machine: Machine) -> tuple[torch.dtype, str]:
    """The dtype of a run's computation on a GPU, and a sentence on why. Raises InputError for int8."""
    asked = run.train.compute
    if asked == "int8":
        raise InputError(
            "int8 is for processors with VNNI; a GPU computes auto, bfloat16, float16 or float32", "train.compute"
        )
    if asked == "float32":
        return torch.float32, "float32 (asked for), kernels of a GPU"
    if asked == "float16" or (asked == "auto" and not machine.computes_bfloat16):
        why = "asked for" if asked == "float16" else f"a {machine.name} has no bfloat16"
        return torch.float16, f"float16 with a scaled loss ({why}), kernels of a GPU"
    why = "the GPU computes it" if asked == "auto" else "asked for"
    slow = "" if machine.computes_bfloat16 else "; this GPU has no units for it: slow"
    return torch.bfloat16, f"bfloat16 ({why}{slow}), kernels of a GPU"


def gpu_memory(
    run: RunConfig, config: PretrainedConfig, workload: Workload, dtype: torch.dtype, sharded: bool = False
) -> GpuMemory:
    """Dry-runs the step as a GPU does it. `sharded`: as one of several that share weights, gradients and states."""
    anatomy = read_anatomy(run, config, dtype)
    workspaces = DeviceWorkspaces(sharded)
    step = step_memory(run, config, anatomy, shape_of(run, workload), dtype, "reference", workspaces)
    return GpuMemory(anatomy, step, workspaces.largest_decoded)


def peak_on(machine: Machine, run: RunConfig, config: PretrainedConfig, workload: Workload) -> int:
    """Bytes at the peak of a run on a device of `machine` that holds everything: `plan_for` without the page.

    Raises as `plan_for` does.
    """
    if machine.kind == "gpu":
        return gpu_memory(run, config, workload, gpu_dtype(run, machine)[0]).peak_bytes
    computation = choose_computation(run, detect(with_accelerators=False))
    anatomy = read_anatomy(run, config, computation.dtype)
    step = step_memory(run, config, anatomy, shape_of(run, workload), computation.dtype, computation.backend)
    weights = anatomy.frozen_bytes + anatomy.int8_bytes + anatomy.trained_bytes
    return weights + step.resident + resident_bytes() + RUN_BYTES


def _gpu_notes(run: RunConfig, anatomy: Anatomy, machine: Machine) -> list[str]:
    notes = [NO_TIME_GPU]
    train = run.train
    if machine.count > 1:
        notes.append(
            f"Each GPU takes {train.accumulation} micro-batches of {train.micro_batch} a step: "
            f"{machine.count * train.accumulation * train.micro_batch} rows in all."
        )
    if machine.source == "you":
        notes.append("A card shows programs up to a tenth less than the size on its box; --on NAME knows it.")
    if train.score_every_steps is not None:
        notes.append("What answering questions for scores (train.score_every_steps) holds is not counted.")
    if run.method == "full" and train.optimizer == "adamw":
        wide, narrow = _gb(16 * anatomy.trained_elements), _gb(8 * anatomy.trained_elements)
        notes.append(
            f"Weights, gradients and both moments are float32, as fitune trains them: {wide}. A recipe in pure "
            f"bfloat16 holds {narrow} of them, and loses small updates."
        )
    return notes


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _plan_on_cpu(
    run: RunConfig, model: str, config: PretrainedConfig, machine: Machine, workload: Workload, learning_rate: float,
    choices: tuple[Choice, ...], budget_bytes: int | None,
) -> Plan:  # fmt: skip
    hardware = detect()
    computation = choose_computation(run, hardware)
    there = replace(hardware, memory_bytes=machine.memory_bytes, available_bytes=machine.memory_bytes)
    plan = make_plan(
        run, model, config, computation, there, workload, learning_rate, False, choices, budget_bytes
    )  # fmt: skip
    fields: dict[str, Any] = {name: getattr(plan, name) for name in Plan.__dataclass_fields__}
    fields["available_bytes"] = machine.memory_bytes
    notes = (
        NO_TIME_CPU,
        "Computed as on this machine (its number format and kernels); the system itself needs some memory too.",
    )
    return ElsewherePlan(**fields, machine=machine, sharding=None, notes=notes)
