from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fitune.quant import parameter as room
from fitune.quant.nf4 import quantise
from fitune.quant.parameter import QuantisedParameter, replace_parameter

# Elements of one part: whole blocks of blocks, whole blocks, neither.
SHAPES = [(3, 128, 128), (5, 24, 64), (4, 17, 9)]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> QuantisedParameter:
    torch.manual_seed(0)
    return QuantisedParameter(quantise(torch.randn(shape), "reference"), dtype, "reference")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_is_the_whole_indexed(shape: tuple[int, ...]) -> None:
    parameter = make(shape)
    whole = parameter.nf4().dense(torch.float32, "reference")
    assert torch.equal(parameter.dense(), whole)
    for index in (0, shape[0] - 1, -1):
        assert torch.equal(parameter[index], whole[index])
    assert torch.equal(parameter[torch.tensor(1)], whole[1])
    assert torch.equal(parameter[torch.tensor([2, 0])], whole[torch.tensor([2, 0])])
    assert torch.equal(parameter[1:, 0], whole[1:, 0])
    assert [torch.equal(one, other) for one, other in zip(parameter, whole, strict=True)] == [True] * shape[0]
    with pytest.raises(IndexError):
        parameter[shape[0]]


def test_it_stands_for_a_tensor() -> None:
    parameter = make((4, 24, 64))
    whole = parameter.dense()
    x = torch.randn(4, 5, 64)
    assert torch.equal(torch.bmm(x, parameter.transpose(1, 2)), torch.bmm(x, whole.transpose(1, 2)))
    assert torch.equal(F.linear(x[0], make((24, 64))), F.linear(x[0], make((24, 64)).dense()))
    assert torch.equal(torch.cat([parameter, parameter]), torch.cat([whole, whole]))
    assert torch.equal(x[0] @ make((64, 24)), x[0] @ make((64, 24)).dense())
    assert (parameter.shape, parameter.dtype, parameter.device.type) == (whole.shape, torch.float32, "cpu")
    assert parameter.to(torch.bfloat16).dtype == torch.bfloat16
    assert parameter.codes.dtype == torch.uint8
    with pytest.raises(AttributeError):
        parameter.no_such_attribute  # noqa: B018


class Experts(nn.Module):
    """What transformers' eager mixtures do: one expert after the other, chosen by an index tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Parameter(torch.randn(3, 32, 64) * 0.1, requires_grad=False)
        self.down = nn.Parameter(torch.randn(3, 64, 32) * 0.1, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in torch.arange(3):
            inner = F.linear(x, self.up[expert]).relu()
            out = out + F.linear(inner, self.down[expert])
        return out


def quantised_experts() -> tuple[Experts, Experts]:
    """With NF4 stacks, and with their decoded values as ordinary parameters."""
    ours, dense = Experts(), Experts()
    for name in ("up", "down"):
        stack = QuantisedParameter(quantise(getattr(ours, name).data, "reference"), torch.float32, "reference")
        getattr(dense, name).data.copy_(stack.dense())
        replace_parameter(ours, name, stack)
    return ours, dense


def test_gradients_pass_through_and_nothing_decoded_is_kept() -> None:
    ours, dense = quantised_experts()
    results = []
    for experts in (ours, dense):
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        out = experts(x)
        if experts is ours:
            gc.collect()
            assert not room._ALIVE  # no decoded expert lives on for the backward pass
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


def test_a_wrong_expert_in_the_backward_pass_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, dense = quantised_experts()
    right = room._Origin.decode
    x = torch.randn(7, 64, requires_grad=True)
    out = ours(x)
    shifted = lambda origin: right(room._Origin(origin.parameter, (origin.index + 1) % 3))  # noqa: E731
    monkeypatch.setattr(room._Origin, "decode", shifted)
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(dense(x).square().sum(), x)
    assert (found - expected).norm() > 0.1 * expected.norm()


def test_layers_computed_again_in_the_backward_pass_keep_nothing_of_the_experts() -> None:
    ours, dense = quantised_experts()
    kept: list[weakref.ref[Tensor]] = []
    relu = Tensor.relu

    def noted(x: Tensor) -> Tensor:
        out = relu(x)
        kept.append(weakref.ref(out))
        return out

    gradients = []
    for experts in (ours, dense):
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "relu", noted)
            out = checkpoint(experts, x, use_reentrant=False)
            gc.collect()
            assert len(kept) == 3
            assert all(reference() is None for reference in kept)
        kept.clear()
        out.square().sum().backward()
        gradients.append(x.grad)
    assert not room._ALIVE
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-6)
