"""States and gradients in a file: the bits of the ordinary optimizer, whatever is clipped, tied, left out or odd."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fitune.data.collation import collate
from fitune.fuse.model import FusedModel, prepare
from fitune.kernels import native
from fitune.step import paged_gradients, paged_optimizer
from fitune.step.gradients import HeldGradients, gradients_of
from fitune.step.optimizer import close, give_back, make_optimizer, states_of
from fitune.step.paged_optimizer import PagedOptimizer
from fitune.step.update import NonFiniteError, update
from tiny_models import BACKEND, model_of, random_samples

SLICE = 4096
KINDS = [("adamw", "reference"), ("adamw8bit", "reference"), ("adamw8bit", "native"), ("lion", "reference")]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_gradients, "SLICE", SLICE)
    monkeypatch.setattr(paged_optimizer, "SLICE", SLICE)


def parameters(name: str) -> list[nn.Parameter]:
    """Of many sizes: less than a slice, whole ones, a little more; a single number; transposed.

    8-bit kernels take no transposed ones.
    """
    draw = torch.Generator().manual_seed(5)
    shapes = [(5,), (4095,), (64, 64), (67, 129), (3 * SLICE + 1,), (2, 3, 1000), ()]
    made = [torch.randn(shape, generator=draw) for shape in shapes]
    if name == "adamw":
        made.append(torch.randn(70, 130, generator=draw).t())
    return [nn.Parameter(value) for value in made]


def step(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], seed: int, limit: float = 0.0) -> float:
    """Two backward passes, of which the second leaves some parameters out, and an update."""
    for half in range(2):
        draw = torch.Generator().manual_seed(10 * seed + half)
        used = own[: len(own) - 3 * half]
        parts = [(p * torch.randn(p.shape, generator=draw) + p.square() / 2).sum() for p in used if p is not own[1]]
        torch.stack(parts).sum().backward()
    gradients = gradients_of(optimizer)
    norm = gradients.norm()
    if limit:
        gradients.scale(limit / norm)
    optimizer.param_groups[0]["lr"] = 1e-2 / (seed + 1)
    optimizer.step()
    gradients.clear()
    return norm


def same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.parametrize("limit", [0.0, 0.3])
@pytest.mark.parametrize(("name", "backend"), KINDS)
def test_every_bit_is_the_ordinary_optimizers(name: str, backend: str, limit: float, tmp_path: Path) -> None:
    if backend == "native" and not native.status().available:
        pytest.skip(native.status().reason)
    held, paged = parameters(name), parameters(name)
    ordinary = make_optimizer(name, held, (0.9, 0.99), 0.1, backend)
    on_disk = make_optimizer(name, paged, (0.9, 0.99), 0.1, backend, tmp_path)
    assert isinstance(on_disk, PagedOptimizer)
    for number in range(4):
        assert step(ordinary, held, number, limit) == step(on_disk, paged, number, limit)
        assert all(parameter.grad is None for parameter in paged)
    assert all(same(one, two) for one, two in zip(held, paged, strict=True))
    assert not ordinary.state.get(held[1])
    assert not on_disk.state.get(paged[1])
    for one, two in zip(held, paged, strict=True):
        states, others = ordinary.state.get(one, {}), on_disk.state.get(two, {})
        assert states.keys() == others.keys()
        assert all(same(torch.as_tensor(states[key]), torch.as_tensor(others[key])) for key in states)


def test_slices_that_cut_a_block_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paged_gradients, "SLICE", 4096 + 64)
    monkeypatch.setattr(paged_optimizer, "SLICE", 4096 + 64)
    own = parameters("adamw8bit")
    on_disk = make_optimizer("adamw8bit", own, (0.9, 0.99), 0.1, "reference", tmp_path)
    with pytest.raises(RuntimeError, match="must match"):
        step(on_disk, own, 0)


def test_states_are_made_where_the_optimizer_keeps_them(tmp_path: Path) -> None:
    for name in ("adamw", "adamw8bit"):
        held, paged = parameters(name), parameters(name)
        ordinary = make_optimizer(name, held, (0.9, 0.99), 0.1, "reference")
        for number in range(2):
            step(ordinary, held, number)
        on_disk = make_optimizer(name, paged, (0.9, 0.99), 0.1, "reference", tmp_path)
        again = parameters(name)
        third = make_optimizer(name, again, (0.9, 0.99), 0.1, "reference")
        for one, others in ((on_disk, paged), (third, again)):
            for parameter, other in zip(held, others, strict=True):
                other.data.copy_(parameter.data)
                for key, value in ordinary.state.get(parameter, {}).items():
                    target = states_of(one, other)
                    if isinstance(value, Tensor):
                        target[key].copy_(value)
                        give_back(one, target[key])
                    else:
                        target[key] = value
        for optimizer, own in ((ordinary, held), (on_disk, paged), (third, again)):
            step(optimizer, own, 7)
        assert all(same(one, two) and same(one, three) for one, two, three in zip(held, paged, again, strict=True))


def test_a_closed_one_leaves_its_parameters_alone(tmp_path: Path) -> None:
    own = parameters("adamw")
    optimizer = make_optimizer("adamw", own, (0.9, 0.99), 0.1, "reference", tmp_path)
    step(optimizer, own, 0)
    close(optimizer)
    own[0].sum().backward()
    assert own[0].grad is not None
    assert list(tmp_path.iterdir()) == []


def whole_model(tied: bool) -> FusedModel:
    return prepare(model_of("llama", tie_word_embeddings=tied), None, torch.float32, BACKEND)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_update_of_a_whole_model_has_the_same_bits(tied: bool, recompute: bool, tmp_path: Path) -> None:
    """Embeddings that are the head too get their gradient once; what is not finite changes nothing."""
    samples = random_samples([9, 30, 14])
    batches = [collate([samples[:2]], 512, 0), collate([samples[2:]], 512, 0)]
    held, paged = whole_model(tied), whole_model(tied)
    if recompute:
        held.recompute_layers()
        paged.recompute_layers()
        held.graph.train()
        paged.graph.train()
    ordinary = make_optimizer("adamw", held.trainable, (0.9, 0.999), 0.1, "reference")
    on_disk = make_optimizer("adamw", paged.trainable, (0.9, 0.999), 0.1, "reference", tmp_path)
    results = []
    for limit in (0.0, 0.01, 1e9):
        results += [update(held, batches, ordinary, 1e-3, limit), update(paged, batches, on_disk, 1e-3, limit)]
        assert results[-1] == results[-2]
    assert results[0].grad_norm > 0.01
    norm = paged.graph.model.layers[1].input_layernorm.weight
    kept = norm.data.clone()
    before = [parameter.detach().clone() for parameter in paged.trainable]
    norm.data[3] = math.inf
    with pytest.raises(NonFiniteError, match="gradient norm"):
        update(paged, batches, on_disk, 1e-3, 1.0)
    norm.data.copy_(kept)
    assert all(torch.equal(one, two) for one, two in zip(paged.trainable, before, strict=True))
    update(held, batches, ordinary, 1e-3, 1.0)
    update(paged, batches, on_disk, 1e-3, 1.0)
    for one, two in zip(held.trainable, paged.trainable, strict=True):
        assert torch.equal(one, two)


def test_held_gradients_of_nothing_are_zero() -> None:
    own = parameters("adamw")
    assert HeldGradients(torch.optim.SGD(own, lr=1.0)).norm() == 0.0
