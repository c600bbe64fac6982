"""Computing with narrow copies of float32 masters that nobody keeps.

Autocast copies every weight into the dtype of the computation, and autograd keeps the copies for the backward pass:
half of the masters' memory, at the very time when the activations are at their most. Copying again costs a pass over
the weights, some hundredth of a step, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# The nodes of autograd's graph between a saved copy and its master: `linear` saves its weight turned.
_COPIED, _TURNED, _LEAF = "ToCopyBackward0", "TBackward0", "torch::autograd::AccumulateGrad"


@dataclass(frozen=True)
class _Kept:
    """What stands for a saved tensor: itself, or of a copy its master; and its version then, as autograd keeps it.

    `dtype`: of the copy; None: it is no copy. `turned`: whether the copy lay across.
    """

    tensor: Tensor
    version: int
    dtype: torch.dtype | None = None
    turned: bool = False


@contextmanager
def narrow_copies(dtype: torch.dtype) -> Iterator[None]:
    """Inside, products compute in `dtype`; their float32 weights are copied for each, and again in the backward pass.

    Backward passes raise RuntimeError where a weight, or what else they need, was changed since.
    """
    with (
        torch.autocast("cpu", dtype=dtype, cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(_keep, _get),
    ):
        yield


def _keep(saved: Tensor) -> _Kept:
    node, turned = saved.grad_fn, False
    if node is not None and node.name() == _TURNED:
        node, turned = node.next_functions[0][0], True
    if node is not None and node.name() == _COPIED:
        leaf = node.next_functions[0][0]
        if leaf is not None and leaf.name() == _LEAF:
            master = leaf.variable
            if master.shape == (saved.shape[::-1] if turned else saved.shape):
                return _Kept(master, master._version, saved.dtype, turned)
    return _Kept(saved.detach(), saved._version)  # of a result itself the graph would hold itself alive


def _get(kept: _Kept) -> Tensor:
    if kept.tensor._version != kept.version:  # autograd does not look where there are hooks
        raise RuntimeError("a tensor that the backward pass needs was changed in place after the forward pass")
    if kept.dtype is None:
        return kept.tensor
    copy = kept.tensor.detach().to(kept.dtype)
    return copy.t() if kept.turned else copy
