"""8-bit AdamW: native against the reference, the reference against exact AdamW and bitsandbytes, and its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fitune.kernels import contract, native
from fitune.quant.moments import MAPS, UNSIGNED_MAP
from fitune.quant.nf4 import DYNAMIC_MAP
from fitune.step.adamw8bit import AdamW8bit
from fitune.step.fresh_states import LEAST_8BIT_SIZE

needs_native = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
SIZES = (4096, 4097, 10_000, 70_001)


def gradients(count: int, steps: int) -> list[Tensor]:
    """Of very different sizes from place to place, as those of real layers are."""
    draw = torch.Generator().manual_seed(count)
    scale = torch.randn(count, generator=draw).mul_(2).exp_()
    return [torch.randn(count, generator=draw) * scale * 1e-3 for _ in range(steps)]


def trained(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[Tensor], rate: float = 1e-3
) -> None:
    for grad in grads:
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = grad.clone()
        optimizer.step()


def start(count: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(count, generator=torch.Generator().manual_seed(7)))


def test_maps_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(functional.create_dynamic_map(signed=True), DYNAMIC_MAP)
    assert torch.equal(functional.create_dynamic_map(signed=False), UNSIGNED_MAP)


@pytest.mark.parametrize("words", MAPS)
def test_a_guess_is_the_code_or_the_one_below(words: Tensor) -> None:
    """For the least and the greatest float32 of every group that shares its high 16 bits."""
    middles, guesses = words[256:511], words[512:].view(torch.int32)
    high = torch.arange(65536, dtype=torch.int64) << 16
    for low in (0, 0x7FFF, 0xFFFF):
        values = (high | low).to(torch.uint32).view(torch.float32)
        inside = values.abs() <= 1
        exact = torch.bucketize(values, middles)
        assert set((exact - guesses)[inside].tolist()) <= {0, 1}


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", SIZES)
def test_native_is_the_reference(count: int, threads: int) -> None:
    found = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for backend in contract.BACKENDS:
            parameter = start(count)
            optimizer = AdamW8bit([parameter], (0.9, 0.99), 0.1, backend)
            trained(optimizer, parameter, gradients(count, 6))
            found[backend] = parameter.detach(), optimizer.state[parameter]
    finally:
        torch.set_num_threads(before)
    (one, state), (two, other) = found["native"], found["reference"]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    for name in ("codes1", "codes2"):
        same = (state[name] == other[name]).float().mean()
        assert same > 0.999, name
    for name in ("absmax1", "absmax2"):
        torch.testing.assert_close(state[name], other[name], rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_it_is_closer_to_exact_adamw_than_bitsandbytes(backend: str) -> None:
    if backend == "native" and not native.status().available:
        pytest.skip(native.status().reason)
    optim = pytest.importorskip("bitsandbytes.optim")
    count, grads = 20_000, gradients(20_000, 20)
    exact, ours, theirs = start(count), start(count), start(count)
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    trained(torch.optim.AdamW([exact], **settings), exact, grads)
    trained(AdamW8bit([ours], (0.9, 0.99), 0.1, backend), ours, grads)
    trained(optim.AdamW8bit([theirs], **settings), theirs, grads)
    assert (ours - exact).norm() < 0.75 * (theirs - exact).norm()
    assert (ours - exact).norm() < 0.4 * (exact - start(count)).norm()


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_a_small_second_moment_beside_a_large_one_does_not_become_zero(backend: str) -> None:
    """A step of the rate is what AdamW takes at most, or some; divided by a zero it would be thousands."""
    if backend == "native" and not native.status().available:
        pytest.skip(native.status().reason)
    parameter = start(LEAST_8BIT_SIZE)
    grad = torch.full((LEAST_8BIT_SIZE,), 1e-6)
    grad[::256] = 10.0
    trained(AdamW8bit([parameter], (0.9, 0.99), 0.0, backend), parameter, [grad, grad * 0, grad * 0])
    assert (parameter - start(LEAST_8BIT_SIZE)).abs().max() < 1e-2


def test_small_tensors_are_exact() -> None:
    count = LEAST_8BIT_SIZE - 1
    exact, ours = start(count), start(count)
    trained(torch.optim.AdamW([exact], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1), exact, gradients(count, 5))
    trained(AdamW8bit([ours], (0.9, 0.99), 0.1, "reference"), ours, gradients(count, 5))
    torch.testing.assert_close(ours, exact)


def test_the_first_step_is_that_of_bitsandbytes() -> None:
    """Later ones differ: its CPU path reads codes from a grid that is coarser than the maps near zero."""
    optim = pytest.importorskip("bitsandbytes.optim")
    theirs, ours = start(10_000), start(10_000)
    grads = gradients(10_000, 1)
    trained(optim.AdamW8bit([theirs], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1), theirs, grads)
    trained(AdamW8bit([ours], (0.9, 0.99), 0.1, "reference"), ours, grads)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_state_that_is_put_back_goes_on_to_the_same_bits() -> None:
    grads = gradients(10_000, 6)
    whole, first = start(10_000), start(10_000)
    trained(AdamW8bit([whole], (0.9, 0.99), 0.1, "reference"), whole, grads)
    before = AdamW8bit([first], (0.9, 0.99), 0.1, "reference")
    trained(before, first, grads[:3])
    second = nn.Parameter(first.detach().clone())
    after = AdamW8bit([second], (0.9, 0.99), 0.1, "reference")
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.state[second]["codes1"].dtype == torch.uint8
    trained(after, second, grads[3:])
    assert torch.equal(whole, second)


def test_a_tensor_without_a_gradient_is_left_alone() -> None:
    parameter = start(5000)
    optimizer = AdamW8bit([parameter], (0.9, 0.99), 0.1, "reference")
    optimizer.step()
    assert torch.equal(parameter, start(5000))
    assert not optimizer.state[parameter]
