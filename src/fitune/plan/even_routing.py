"""Dry runs of mixtures of experts: which expert gets which token is decided by values that fake tensors lack.

Inside `EvenRouting` routing is taken to be even: every expert is hit, and each gets the same number of tokens. A real
router's favourites need more workspace at a time, never more in the sum over all experts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten


class EvenRouting(TorchDispatchMode):
    """To be entered inside a FakeTensorMode with `allow_non_fake_inputs`.

    Answers with real tensors what would need values: the experts hit (a mask of one entry an expert), the places of
    one expert's tokens (a mask [k, tokens] or [tokens]: a share of one over the number of experts), and how many
    tokens each expert has. What is computed from real tensors alone is computed, so that code may read it. Where no
    mixture has run yet the fake mode answers, and refuses what needs values.

    Args:
        expert_counts: how many experts the model's mixtures have.
    """

    def __init__(self, expert_counts: Collection[int]) -> None:
        super().__init__()
        self._counts = frozenset(expert_counts)
        self._experts = 0  # of the mixture that is running
        self._chosen = 0  # tokens times experts a token

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _ATEN.nonzero.default and (self._experts or self._is_hit_list(args[0])):
            return self._places(args[0])
        if func is _ATEN.index.Tensor and self._experts and any(_is_mask(index) for index in args[1]):
            return func(args[0], self._as_places(args[1]))
        if func is _ATEN.topk.default and args[0].shape[-1] in self._counts:
            self._experts, self._chosen = args[0].shape[-1], args[0].shape[:-1].numel() * args[1]
        if func is _ATEN.sum.dim_IntList and self._counts_tokens(args[0], args[1]):
            return self._sizes()
        if func is _ATEN._grouped_mm.default:  # computed in float32 too, though its fake refuses that
            return _grouped_product(*args, **kwargs)
        return func(*args, **kwargs)

    def _places(self, mask: Tensor) -> Tensor:
        """[n, dimensions] int64, as `nonzero` gives them."""
        if self._is_hit_list(mask):
            self._experts = mask.shape[0] if mask.shape[0] in self._counts else mask.shape[0] - 1
            return _first_places((self._experts,), self._experts)
        return _first_places(tuple(mask.shape), -(-mask.numel() // self._experts))

    def _is_hit_list(self, mask: Tensor) -> bool:
        """Which experts are hit; there may be one more entry, for tokens that belong to experts elsewhere."""
        return mask.dim() == 1 and bool({mask.shape[0], mask.shape[0] - 1} & self._counts)

    def _as_places(self, indices: Any) -> list[Tensor | None]:
        """Masks among the indices of a tensor become the places where they are true."""
        places: list[Tensor | None] = []
        for index in indices:
            places += self._places(index).unbind(1) if _is_mask(index) else [index]
        return places

    def _counts_tokens(self, summed: Tensor, dims: Any) -> bool:
        shape = tuple(summed.shape)
        return not summed.is_floating_point() and list(dims or ()) == [0] and shape[1:] == (self._experts,)

    def _sizes(self) -> Tensor:
        each, more = divmod(self._chosen, self._experts)
        with unset_fake_temporarily():
            return torch.tensor([each + (number < more) for number in range(self._experts)])


def _grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """An empty tensor of the shape of the products, group by group: [N, K] x [E, K, M] or [K, N] x [N, M]."""
    groups = () if offs is None or a.dim() + b.dim() != 4 else (offs.shape[0],)
    stacked = a.shape[:-2] if a.dim() == b.dim() == 3 else groups
    return a.new_empty((*stacked, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype)


def _is_mask(index: Any) -> bool:
    return isinstance(index, FakeTensor) and index.dtype in (torch.bool, torch.uint8)


def _first_places(shape: tuple[int, ...], rows: int) -> Tensor:
    """[rows, dimensions]: the first places of a tensor of `shape`."""
    with unset_fake_temporarily():
        return torch.stack(torch.unravel_index(torch.arange(rows), shape), 1)
