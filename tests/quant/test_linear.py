"""The quantised linear against an ordinary one that holds the decoded weight, and the leases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitune.kernels import contract, native
from fitune.quant.lease import DecodedAtUse, DecodedOnce, leased
from fitune.quant.linear import QuantisedLinear
from fitune.quant.nf4 import quantise

BACKENDS = [name for name in contract.BACKENDS if name != "native" or native.status().available]


def make(bias: bool, backend: str, dtype: torch.dtype = torch.float32) -> QuantisedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 80, generator=generator) * 0.1
    offset = torch.randn(48, generator=generator).to(dtype) if bias else None
    return QuantisedLinear(quantise(weight, backend), offset, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(80,), (3, 80), (2, 5, 80), (0, 80)])
def test_output_and_gradient_are_those_of_the_dense_weight(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, backend: str
) -> None:
    linear = make(bias, backend)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    dense = linear.nf4().dense(dtype, backend)
    expected = F.linear(other, dense, None if linear.bias is None else linear.bias.to(dtype))
    found = linear(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (ours,) = torch.autograd.grad(found, x, grad)
    (theirs,) = torch.autograd.grad(expected, other, grad)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_it_is_a_frozen_linear_layer() -> None:
    linear = make(True, BACKENDS[0])
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (80, 48)
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    assert set(linear.state_dict()) == {"weight.codes", "weight.absmax", "weight.nested_absmax", "bias"}
    before = [value.clone() for value in linear.state_dict().values()]
    with torch.no_grad():
        linear.eval()(torch.randn(1, 80))
    linear.train()
    assert all(torch.equal(one, other) for one, other in zip(before, linear.state_dict().values(), strict=True))
    assert "nf4" in repr(linear)


class CountingLease:
    """A policy that counts who holds what."""

    def __init__(self) -> None:
        self.held = 0
        self.acquired = 0

    def acquire(self, linear: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        self.held += 1
        self.acquired += 1
        return DecodedAtUse().acquire(linear, dtype)

    def release(self, linear: QuantisedLinear) -> None:
        self.held -= 1


def test_weights_are_given_back_forward_backward_and_on_failure() -> None:
    linear = make(False, BACKENDS[0])
    linear.lease = lease = CountingLease()
    linear(torch.randn(2, 80, requires_grad=True)).sum().backward()
    assert (lease.held, lease.acquired) == (0, 2)
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 81))
    assert lease.held == 0


def test_decoding_once_gives_the_same_numbers_and_ends_with_the_block() -> None:
    model = nn.Sequential(make(True, BACKENDS[0]), nn.ReLU(), nn.Linear(48, 4))
    x = torch.randn(3, 80)
    before, own = model(x), model[0].lease
    lease = DecodedOnce()
    with leased(model, lease):
        assert model[0].lease is lease
        assert torch.equal(model(x), before)
        first = lease.acquire(model[0], torch.float32)
        assert lease.acquire(model[0], torch.float32) is first
        assert lease.acquire(model[0], torch.bfloat16).dtype == torch.bfloat16
    assert model[0].lease is own
    with pytest.raises(ZeroDivisionError), leased(model, lease):
        1 / 0  # noqa: B018
    assert model[0].lease is own
