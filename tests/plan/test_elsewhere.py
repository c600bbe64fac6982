"""Plans for machines that are not here: sums, sharding, number formats, and published measurements."""

from __future__ import annotations

import pytest
import torch

from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.hardware import detect
from fitune.models.graph import build_graph
from fitune.models.presets import find_preset, preset_config
from fitune.plan.anatomy import read_anatomy
from fitune.plan.computation import choose_computation
from fitune.plan.elsewhere import (
    ALLOCATOR_SHARE,
    BLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    ElsewherePlan,
    gpu_memory,
    peak_on,
    plan_for,
)
from fitune.plan.machines import Machine, find_machine
from fitune.plan.planner import Workload, make_plan
from fitune.plan.sharding import read_units
from tiny_models import config_of

WORK = Workload(10, 1000, 32, 0.4, 64)
CARD = find_machine("rtx3090", None, 1)
TINY = config_of("llama", num_hidden_layers=4)


def run_of(method: str = "qlora", lora: dict[str, object] | None = None, **train: object) -> RunConfig:
    adapter = {"lora": lora} if lora else {}
    return RunConfig.model_validate(
        {"model": "tiny", "method": method, "data": {"train": "a"}, "train": train, **adapter}
    )


def planned(run: RunConfig, machine: Machine = CARD, workload: Workload = WORK) -> ElsewherePlan:
    plan = plan_for(run, "tiny", TINY, machine, workload, 1e-4)
    assert isinstance(plan, ElsewherePlan)
    return plan


def items(plan: ElsewherePlan) -> dict[str, float]:
    return {item.name: float(item.value) for item in plan.memory}


@pytest.mark.parametrize(("method", "recompute"), [("qlora", "none"), ("lora", "layers"), ("full", "layers")])
def test_a_plan_adds_up(method: str, recompute: str) -> None:
    plan = planned(run_of(method, recompute=recompute))
    assert all(item.value >= 0 for item in plan.memory)
    assert sum(item.value for item in plan.memory) == plan.peak_bytes
    assert plan.available_bytes == 24576 * 2**20
    assert plan.fits
    assert (plan.seconds, plan.seconds_per_step) == (None, None)
    facts = plan.as_dict()
    assert facts["machine"]["name"] == "rtx3090"
    assert facts["sharding"] is None
    assert any("time is not known" in note for note in facts["notes"])


def test_weights_are_held_as_a_gpu_holds_them() -> None:
    """16 bits for lora, float32 masters with gradients and two moments for full."""
    parameters = list(build_graph(TINY, torch.bfloat16).parameters())
    elements = sum(parameter.numel() for parameter in parameters)
    assert items(planned(run_of("lora")))["frozen weights"] == pytest.approx(2 * elements, rel=0.01)
    plan = planned(run_of("full"))
    assert plan.peak_bytes == peak_on(CARD, run_of("full"), TINY, WORK)
    full = items(plan)
    assert full["trained weights"] == 4 * elements
    assert full["optimizer states"] == pytest.approx(8 * elements, rel=0.01)
    assert any(f"{16 * elements / 1e9:.1f} GB" in note and "bfloat16" in note for note in plan.notes)


def test_the_number_format_is_the_cards() -> None:
    old = find_machine("t4", None, 1)
    chosen, wide, narrow = (planned(run_of("lora", compute=asked), old) for asked in ("auto", "float32", "bfloat16"))
    assert items(wide)["frozen weights"] == pytest.approx(2 * items(narrow)["frozen weights"], rel=0.01)
    assert items(chosen)["frozen weights"] == items(narrow)["frozen weights"]
    for plan, words in ((chosen, "float16 with a scaled loss (a t4 has no bfloat16)"), (narrow, "no units for it")):
        assert words in str({item.name: item.value for item in plan.settings}["computation"])
    with pytest.raises(InputError, match="int8 is for processors with VNNI"):
        planned(run_of("qlora", compute="int8"))


def test_memory_is_straight_in_the_length_of_a_row() -> None:
    """No [T, T] scores: what they would add at the longest of these is far above what is allowed."""
    run = run_of("lora", micro_batch=1)
    peaks = [
        gpu_memory(run, TINY, Workload(0, 0, tokens, 0.5, tokens), torch.bfloat16).step.peak
        for tokens in (2048, 4096, 8192)
    ]
    scores = 4 * TINY.num_attention_heads * 8192**2
    assert abs((peaks[2] - peaks[1]) - 2 * (peaks[1] - peaks[0])) < 0.02 * scores


def test_sharding_divides_weights_gradients_and_states_only() -> None:
    run = run_of("full", recompute="layers", accumulation=4)
    machine = find_machine("rtx3090", None, 4)
    plan = planned(run, machine)
    found = plan.sharding
    assert found is not None
    elements = sum(parameter.numel() for parameter in build_graph(TINY, torch.bfloat16).parameters())
    assert found.shard_bytes == pytest.approx(16 * elements / 4, rel=0.01)
    assert found.gather_bytes_per_micro_batch == pytest.approx(2 * 2 * elements * 3 / 4, rel=0.01)
    assert found.reduce_bytes_per_micro_batch == pytest.approx(4 * elements * 3 / 4, rel=0.01)
    assert found.bytes_per_step == 4 * (found.gather_bytes_per_micro_batch + found.reduce_bytes_per_micro_batch)
    assert found.peak_bytes == found.shard_bytes + found.gathered_bytes + found.unsharded_bytes
    assert found.unsharded_bytes > CUDA_CONTEXT_BYTES + BLAS_WORKSPACE_BYTES
    assert found.fits == (found.peak_bytes <= machine.memory_bytes)
    names = {name: parameter.numel() for name, parameter in build_graph(TINY, torch.bfloat16).named_parameters()}
    layer = sum(size for name, size in names.items() if name.startswith("model.layers.0."))
    outside = sum(size for name, size in names.items() if ".layers." not in name)
    assert found.gathered_bytes == 2 * (outside + 2 * layer)


def test_frozen_four_bit_weights_are_gathered_as_they_are() -> None:
    config = preset_config(find_preset("codellama-13b"))  # type: ignore[arg-type]
    for method in ("qlora", "lora"):
        run = run_of(method)
        anatomy = read_anatomy(run, config, torch.bfloat16)
        units = read_units(run, config, anatomy, torch.bfloat16)
        assert units.total == pytest.approx(anatomy.frozen_bytes + anatomy.trained_bytes, rel=1e-6)
        assert len(units.layers) == 40
        assert units.layer_gradients == pytest.approx(anatomy.trained_bytes / 40, rel=1e-6)


def test_more_rows_are_said() -> None:
    notes = planned(run_of(accumulation=2, micro_batch=4), find_machine("3090", None, 3)).notes
    assert "Each GPU takes 2 micro-batches of 4 a step: 24 rows in all." in notes


def test_a_cpu_of_another_size_is_this_machines_plan() -> None:
    run = run_of()
    machine = find_machine("cpu:64GB", None, 1)
    plan = planned(run, machine)
    here = make_plan(
        run, "tiny", TINY, choose_computation(run, detect()), detect(), WORK, 1e-4, with_time=False
    )  # fmt: skip
    assert [(item.name, item.origin) for item in plan.memory] == [(item.name, item.origin) for item in here.memory]
    assert plan.peak_bytes == pytest.approx(here.peak_bytes, rel=0.05)
    assert plan.available_bytes == 64 * 10**9
    assert plan.seconds_per_step is None
    assert "Time is not known" in plan.notes[0]


@pytest.mark.parametrize(("method", "published_gib"), [("lora", 16.2), ("qlora", 7.4)])
def test_beside_published_measurements(method: str, published_gib: float) -> None:
    """torchtune's README (commit 0031bfb): Llama-3.1-8B, batch 2, rows of 2048 packed, RTX 4090, layers recomputed.

    What torch allocated and reserved, without the CUDA context; rank 8 on all linear layers. docs/plan.md explains
    what is left between the two.
    """
    config = preset_config(find_preset("llama-3.1-8b"))  # type: ignore[arg-type]
    run = run_of(method, {"rank": 8, "alpha": 16}, micro_batch=2, recompute="layers")
    peak = gpu_memory(run, config, Workload(0, 0, 512, 1.0, 2048), torch.bfloat16).peak_bytes - CUDA_CONTEXT_BYTES
    assert peak / 2**30 == pytest.approx(published_gib, rel=0.1)


def test_what_the_allocator_holds_follows_what_is_allocated_anew() -> None:
    memory = gpu_memory(run_of("lora"), TINY, WORK, torch.bfloat16)
    assert memory.allocator_bytes == round(ALLOCATOR_SHARE * (memory.step.peak - memory.step.optimizer))
    weights = memory.anatomy.frozen_bytes + memory.anatomy.trained_bytes
    parts = weights + memory.step.peak + memory.allocator_bytes + CUDA_CONTEXT_BYTES + BLAS_WORKSPACE_BYTES
    assert memory.peak_bytes == parts
