"""Against autocast, which keeps its copies to the end of the backward pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fitune.fuse.narrow_copies import narrow_copies
from fitune.plan.live_bytes import LiveBytes


class _Products(nn.Module):
    """Weights as layers hold them: with a bias and without, lying across, and used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 48, bias=False)
        self.across = Conv1D(24, 48)
        self.last = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.across(nn.functional.silu(self.first(x)))
        return torch.exp(-self.last(self.last(inner)).float().square())


def test_gradients_have_the_bits_of_autocast() -> None:
    torch.manual_seed(0)
    model, x = _Products(), torch.randn(3, 5, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # its cache adds up gradients in bfloat16
        expected = model(x).sum()
    with narrow_copies(torch.bfloat16):
        found = model(x).sum()
    assert torch.equal(found, expected)
    inputs = [x, *model.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):  # fmt: skip
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_gradients_are_those_of_float32_but_for_rounding() -> None:
    torch.manual_seed(0)
    model, x = _Products(), torch.randn(3, 5, 24, requires_grad=True)
    inputs = [x, *model.parameters()]
    exact = torch.autograd.grad(model(x).sum(), inputs)
    with narrow_copies(torch.bfloat16):
        loss = model(x).sum()
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), exact, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.03


@pytest.mark.parametrize("make", [lambda: nn.Linear(512, 512), lambda: Conv1D(512, 512)], ids=["linear", "across"])
def test_no_copy_of_a_weight_is_kept(make) -> None:
    model, x = nn.Sequential(*(make() for _ in range(4))), torch.randn(2, 512, requires_grad=True)
    weights = sum(2 * parameter.numel() for parameter in model.parameters())  # in bfloat16

    def kept(context) -> int:
        with LiveBytes() as live, context:
            out = model(x)
        found = live.current
        del out
        return found

    assert kept(torch.autocast("cpu", torch.bfloat16)) > weights
    assert kept(narrow_copies(torch.bfloat16)) < weights / 8


def test_a_weight_that_was_changed_is_refused() -> None:
    model, x = nn.Linear(8, 8), torch.randn(2, 8, requires_grad=True)
    with narrow_copies(torch.bfloat16):
        loss = model(x).sum()
    with torch.no_grad():
        model.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="was changed in place"):
        loss.backward()


def test_a_result_that_was_changed_is_refused() -> None:
    x = torch.randn(8, requires_grad=True)
    with narrow_copies(torch.bfloat16):
        saved = x.exp()
        loss = saved.square().sum()
    saved.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="was changed in place"):
        loss.backward()


def test_results_that_the_graph_keeps_die_with_it() -> None:
    x = torch.randn(8, requires_grad=True)
    gc.disable()
    try:
        with narrow_copies(torch.bfloat16):
            out = x.exp()  # saves its own result
        gone = weakref.ref(out)
        del out
        assert gone() is None
    finally:
        gc.enable()
