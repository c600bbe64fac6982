"""The dry run: linear in layers, the same on fake tensors as on real ones, and a plan that adds up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from fitune.audit.tiny_configs import tiny_config
from fitune.config.schema import RunConfig
from fitune.errors import FituneError
from fitune.fuse.head import LogitForm
from fitune.hardware import detect
from fitune.kernels.rooms import SMALLEST_BYTES, a_pass, rooms
from fitune.models.folder import FolderSource
from fitune.plan.anatomy import read_anatomy
from fitune.plan.computation import Computation
from fitune.plan.dry_run import Shape, StepMemory, step_memory, step_seconds
from fitune.plan.live_bytes import LiveBytes
from fitune.plan.parts import Parts
from fitune.plan.planner import Workload, make_plan
from fitune.train.prepare import build_for_training
from tiny_models import BACKEND, config_of, write_model

SHAPE = Shape(2, 64, 32, 60)


def run_of(method: str = "qlora", **train: object) -> RunConfig:
    return RunConfig.model_validate({"model": "tiny", "method": method, "data": {"train": "a"}, "train": train})


def memory_of(run: RunConfig, config: PretrainedConfig, dtype: torch.dtype) -> StepMemory:
    return step_memory(run, config, read_anatomy(run, config, dtype), SHAPE, dtype, BACKEND)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_memory_is_linear_in_layers(method: str, recompute: str) -> None:
    dtype = torch.float32 if method == "full" else torch.bfloat16
    run = run_of(method, recompute=recompute)
    found = [memory_of(run, config_of("llama", num_hidden_layers=layers), dtype) for layers in (3, 5, 7)]
    for name in ("optimizer", "saved", "peak"):
        three, five, seven = (getattr(memory, name) for memory in found)
        assert seven - five == pytest.approx(five - three, abs=0.02 * max(1, seven)), name
    assert 0 < found[0].optimizer < found[0].peak
    assert 0 < found[0].saved < found[0].peak


def test_what_optimizers_keep_of_all_weights() -> None:
    config = config_of("llama", num_hidden_layers=2)
    adamw, adamw8bit, lion, adafactor = (
        memory_of(run_of("full", optimizer=name), config, torch.float32).optimizer
        for name in ("adamw", "adamw8bit", "lion", "adafactor")
    )
    assert 0.25 < adamw8bit / adamw < 0.35
    assert 0.49 < lion / adamw < 0.51
    assert adafactor / adamw < 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_states_and_gradients_on_disk_take_no_memory(optimizer: str) -> None:
    config = config_of("llama", num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
    held, paged = (
        memory_of(run_of("full", optimizer=optimizer, optimizer_states=where), config, torch.float32)
        for where in ("memory", "disk")
    )
    trained = read_anatomy(run_of("full"), config, torch.float32).trained_bytes
    assert (held.disk, paged.optimizer, paged.saved) == (0, 0, held.saved)
    assert paged.disk == pytest.approx(trained + held.optimizer, rel=0.01)
    assert held.peak > held.optimizer + trained
    assert paged.peak < paged.saved + 0.4 * trained  # one layer's gradients are there at a time


def test_accumulated_gradients_are_in_the_peak() -> None:
    config = config_of("llama", num_hidden_layers=2)
    once, twice = (memory_of(run_of("full", accumulation=count), config, torch.float32) for count in (1, 2))
    assert twice.peak > once.peak


@pytest.mark.parametrize(("method", "recompute"), [("full", "none"), ("lora", "none"), ("lora", "layers")])
def test_what_is_saved_leaves_holes_and_is_found_again(method: str, recompute: str) -> None:
    config = config_of("llama", num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
    memory = memory_of(run_of(method, recompute=recompute), config, torch.float32)
    assert memory.peak < memory.resident <= memory.peak + memory.saved + memory.in_rooms
    again, more = (
        memory_of(run_of(method, recompute=recompute, accumulation=count), config, torch.float32) for count in (2, 5)
    )
    assert memory.resident <= again.resident < 1.25 * memory.resident  # gradients are there from the start
    assert more == again


@pytest.mark.skipif(BACKEND != "native", reason="rooms are for results of native kernels")
@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("recompute", ["none", "layers"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_planned_rooms_are_the_real_ones(
    method: str, recompute: str, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six layers; the plan runs two of them."""
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    shape = Shape(2, 512, 256, 1000)
    folder = write_model(tmp_path / "model", num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
    run = run_of(method, recompute=recompute, accumulation=accumulation)
    source, dtype = FolderSource(folder), torch.bfloat16
    anatomy = read_anatomy(run, source.config, dtype)
    planned = step_memory(run, source.config, anatomy, shape, dtype, BACKEND)
    model = build_for_training(run, source, Computation(dtype, BACKEND, 1, "a test"))
    tokens = torch.randint(100, 200, (2, 512))
    positions = (torch.arange(512) % 256).expand(2, -1)
    rooms.clear()
    with a_pass():
        for _ in range(accumulation):
            chosen = torch.arange(1, 1001)
            (-model.logprobs_at(tokens, positions, shape.documents(), chosen).sum()).backward()
        found = rooms.held_bytes
    rooms.clear()
    assert found > 4 * SMALLEST_BYTES
    assert planned.in_rooms == found


def live_of(work) -> tuple[int, int]:
    with LiveBytes() as live:
        kept = work()
    result = live.current, live.peak
    del kept
    return result


def some_work() -> list[torch.Tensor]:
    a = torch.ones(1000)
    b = a * 2
    c = b.view(10, 100).t()  # a view is no memory
    d = torch.cat([b, b])
    del b
    e = torch.zeros(8, dtype=torch.int8)
    e.add_(1)
    return [a, c, d, e]


def test_fake_tensors_count_like_real_ones() -> None:
    expected = 4 * 1000 + 4 * 1000 + 8 * 1000 + 8
    assert live_of(some_work) == (expected, expected)
    with FakeTensorMode():
        assert live_of(some_work) == (expected, expected)


def test_freed_memory_is_no_longer_counted() -> None:
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = a + 1
        assert live.current == 8000
        del a
        assert live.current == 4000
        live.reset_peak()
        assert live.peak == 4000
        c = b * 2
        assert live.peak == 8000
        assert "mul" in live.peak_operator
        del b, c
    assert live.current == 0


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("layers", [1, 4])
def test_a_plan_adds_up(method: str, layers: int) -> None:
    dtype = torch.float32 if method == "full" else torch.bfloat16
    computation = Computation(dtype, BACKEND, 1, "a test")
    plan = make_plan(
        run_of(method), "tiny", config_of("llama", num_hidden_layers=layers), computation, detect(),
        Workload(10, 1000, 32, 0.4, 64), 1e-4, with_time=False,
    )  # fmt: skip
    assert all(item.value >= 0 for item in plan.memory)
    assert sum(item.value for item in plan.memory) == plan.peak_bytes
    assert plan.fits
    assert plan.as_dict()["fits"]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_time_is_measured(family: str) -> None:
    run, config = run_of(), config_of(family)
    anatomy = read_anatomy(run, config, torch.float32)
    assert 0 < step_seconds(run, config, anatomy, SHAPE, torch.float32, BACKEND, Parts(True, LogitForm())) < 5


def test_a_model_that_looks_at_values_is_refused_in_a_sentence() -> None:
    with pytest.raises(FituneError, match="blt model cannot be planned: its forward asks for values"):
        memory_of(run_of(), tiny_config("blt"), torch.bfloat16)
