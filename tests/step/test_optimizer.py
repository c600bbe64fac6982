"""Lion and Adafactor: the published updates, what they take, and that their states go on."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from fitune.errors import InputError
from fitune.step.fresh_states import ELEMENT_WISE, FRESH, in_memory
from fitune.step.optimizer import BETAS, make_optimizer, states_of
from fitune.step.parameter_groups import parameter_groups

RATES = [1e-2, 3e-3, 1e-3, 5e-4]


def start() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((6, 40), (7,), (2, 3, 5), ())]


def gradients() -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(4)
    return [[torch.randn(one.shape, generator=draw) for one in start()] for _ in RATES]


def trained(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], first: int = 0, last: int = 4) -> None:
    for rate, grads in list(zip(RATES, gradients(), strict=True))[first:last]:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, grad in zip(own, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("betas", [None, (0.95, 0.98)])
def test_lion_is_the_papers(betas: tuple[float, float] | None) -> None:
    """Program 1 of arXiv 2302.06675 in numpy: interpolate, take the sign, decay, then the momentum."""
    own = start()
    trained(make_optimizer("lion", own, betas, 0.1, "reference"), own)
    beta1, beta2 = betas or (0.9, 0.99)
    for place, parameter in enumerate(start()):
        weight = parameter.detach().double().numpy()
        momentum = np.zeros_like(weight)
        for rate, grads in zip(RATES, gradients(), strict=True):
            grad = grads[place].double().numpy()
            update = np.sign(beta1 * momentum + (1 - beta1) * grad)
            weight = weight - rate * (update + 0.1 * weight)
            momentum = beta2 * momentum + (1 - beta2) * grad
        np.testing.assert_allclose(own[place].detach().numpy(), weight, rtol=1e-5, atol=1e-6)


def test_adafactor_learns_at_the_rate_that_is_given() -> None:
    """As transformers' Trainer sets it up: no step of its own size, none by the size of the weights."""
    own, theirs = start(), start()
    trained(make_optimizer("adafactor", own, None, 0.1, "reference"), own)
    reference = Adafactor(theirs, lr=1.0, weight_decay=0.1, scale_parameter=False, relative_step=False)
    trained(reference, theirs)
    assert all(torch.equal(one, other) for one, other in zip(own, theirs, strict=True))
    first = start()
    trained(make_optimizer("adafactor", first, None, 0.0, "reference"), first, last=1)
    moved = (first[0] - start()[0]).square().mean().sqrt()
    assert float(moved.detach()) == pytest.approx(RATES[0], rel=0.3)


@pytest.mark.parametrize("name", list(FRESH))
def test_states_before_the_first_step_are_those_the_optimizer_makes(name: str) -> None:
    own = start()
    optimizer = make_optimizer(name, own, None, 0.0, "reference")
    trained(optimizer, own, last=1)
    for parameter in own:
        made, fresh = optimizer.state[parameter], FRESH[name](parameter, in_memory(parameter.device))
        assert made.keys() == fresh.keys()
        for key, value in made.items():
            if isinstance(value, Tensor):
                assert (fresh[key].shape, fresh[key].dtype) == (value.shape, value.dtype), key


@pytest.mark.parametrize("name", list(FRESH))
def test_states_that_are_put_back_go_on_to_the_same_bits(name: str) -> None:
    whole = start()
    trained(make_optimizer(name, whole, None, 0.1, "reference"), whole)
    own = start()
    before = make_optimizer(name, own, None, 0.1, "reference")
    trained(before, own, last=2)
    after = make_optimizer(name, own, None, 0.1, "reference")
    for parameter in own:
        target = states_of(after, parameter)
        for key, value in copy.deepcopy(before.state[parameter]).items():
            if isinstance(value, Tensor):
                target[key].copy_(value)
            else:
                target[key] = value
    trained(after, own, first=2)
    assert all(torch.equal(one, other) for one, other in zip(own, whole, strict=True))


def test_bytes_of_state() -> None:
    parameter = nn.Parameter(torch.zeros(512, 1024))
    sizes = {
        name: sum(
            value.numel() * value.itemsize
            for value in FRESH[name](parameter, in_memory(parameter.device)).values()
            if isinstance(value, Tensor) and value.dim()
        )
        / parameter.numel()
        for name in FRESH
    }
    assert sizes["adamw"] == 8
    assert sizes["lion"] == 4
    assert sizes["adafactor"] == 4 * (512 + 1024) / (512 * 1024)
    assert 2 < sizes["adamw8bit"] < 2.1


def test_what_each_takes() -> None:
    own = start()
    groups: list[dict[str, Any]] = parameter_groups([("a.lora_B.w", own[0]), ("b", own[1])], 0.1, 16.0)
    for name in FRESH:
        assert len(make_optimizer(name, groups, None, 0.1, "reference").param_groups) == 2
    for name, betas in BETAS.items():
        assert make_optimizer(name, own, None, 0.1, "reference").param_groups[0]["betas"] == betas
        assert make_optimizer(name, own, (0.5, 0.6), 0.1, "reference").param_groups[0]["betas"] == (0.5, 0.6)
    with pytest.raises(InputError, match="no optimizer called 'sgd'"):
        make_optimizer("sgd", own, None, 0.1, "reference")


def test_only_what_is_done_element_by_element_lies_on_disk(tmp_path: Any) -> None:
    assert set(FRESH) - set(ELEMENT_WISE) == {"adafactor"}
    with pytest.raises(InputError, match="whole matrices"):
        make_optimizer("adafactor", start(), None, 0.1, "reference", tmp_path)
