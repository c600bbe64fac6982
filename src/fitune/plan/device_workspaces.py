"""What operators take on a GPU while they run, which their fakes do not show.

A dry run goes through the operators' fakes, and a fake makes an operator's results only. So with backend "reference"
nothing is counted that only its plain-torch meaning needs: no [T, T] scores of attention, no float32 copies in norms.
That is what the kernels of a GPU do too (flash attention, one fused kernel for a norm, an activation or the loss of a
chunk). What these kernels do take beside their results is added here, for as long as the operator runs:

* a product with an NF4 weight decodes the whole weight into the dtype of the computation, and its block maxima into
  float32 (bitsandbytes `functional.dequantize_4bit`, then cuBLAS); one weight at a time, forward and backward;
* the backward pass of attention sums the gradient of the queries in float32, and gives keys and values of every query
  head before they are summed over the heads that share them (flash-attention 2, `csrc/flash_attn/flash_api.cpp`,
  `mha_varlen_bwd`: dq_accum, softmax_d, dk_expanded, dv_expanded);
* adapters' gradients are products in the dtype of the computation before they become float32.

Sources: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py,
https://github.com/Dao-AILab/flash-attention/blob/main/csrc/flash_attn/flash_api.cpp

A model whose attention does not go by documents is run with what transformers chooses for it; torch's own attention
is counted like flash attention there. Where that is spelt out in single products (sinks, bent scores, dropout in
attention), their scores are in the plan, as they would be on a GPU; dropout alone flash attention could do without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

from fitune.kernels.reference import BLOCK

_SDPA_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward"
_ROWS = 128  # flash attention rounds each document up to this, and head sizes to 32 or 64
_FLOAT32 = 4


class DeviceWorkspaces(TorchDispatchMode):
    """To be entered inside what counts bytes: each operator's workspace is an empty tensor that lives while it runs.

    Args:
        sharded: for a run whose trained weights and gradients are spread over devices. Copies of parameters in
            another dtype are not counted (weights are gathered in that dtype, which is counted elsewhere), and the
            dry run drops each gradient once it is there.

    Attributes:
        sharded: as given.
        largest_decoded: bytes of the largest decoded weight that was needed at one time.
    """

    def __init__(self, sharded: bool = False) -> None:
        super().__init__()
        self.largest_decoded = 0
        self.sharded = sharded
        self._parameters: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.sharded and self._copies_parameter(func, args):
            with _pop_mode_temporarily():  # the counting mode
                return func(*args, **(kwargs or {}))
        size = self._size(func, args)
        workspace = torch.empty(size, dtype=torch.uint8) if size else None
        out = func(*args, **(kwargs or {}))
        del workspace
        return out

    def _copies_parameter(self, func: Any, args: Any) -> bool:
        first = args[0] if args else None
        if isinstance(first, nn.Parameter):
            self._parameters.add(first.untyped_storage()._cdata)
        return (
            func is torch.ops.aten._to_copy.default
            and isinstance(first, torch.Tensor)
            and first.untyped_storage()._cdata in self._parameters
        )

    def _size(self, func: Any, args: Any) -> int:
        name = str(func).rpartition(".")[0]
        if name == "fitune.frozen_product":
            x, frozen, _, widths = args[:4]
            return self._decoded([width * x.shape[1] for width in widths], frozen, x.itemsize)
        if name == "fitune.frozen_product_backward":
            grads, frozen, _, depth = args[:4]
            return self._decoded([grad.shape[1] * depth for grad in grads], frozen, grads[0].itemsize)
        if name == "fitune.frozen_product_backward_":
            grads, frozen, _, into = args[:4]
            return self._decoded([grad.shape[1] * into.shape[1] for grad in grads], frozen, grads[0].itemsize)
        if name == "fitune.nf4_dequantise":  # the weight itself is its result
            return _block_maxima(torch.Size(args[5]).numel())
        if name == "fitune.adapter_gradients":
            grads, x, us = args[:3]
            pairs = zip(grads, us, strict=True)
            return int(max(u.shape[1] * max(x.shape[1], grad.shape[1]) for grad, u in pairs) * x.itemsize)
        if name == "fitune.attention_backward":
            _, q, k, _, _, _, documents = args[:7]
            rows, tokens, heads, width = q.shape
            padded = rows * tokens + _ROWS * documents.shape[0]
            return _attention_backward(padded, rows * tokens, heads, k.shape[2], width, q.itemsize)
        if name == _SDPA_BACKWARD:
            rows, heads, tokens, width = args[1].shape
            padded = rows * -(-tokens // _ROWS) * _ROWS
            return _attention_backward(padded, rows * tokens, heads, heads, width, args[1].itemsize)
        return 0

    def _decoded(self, elements: list[int], frozen: Any, itemsize: int) -> int:
        """Of the largest quantised weight among the segments; 0 where all are dense."""
        quantised = [count for place, count in enumerate(elements) if frozen[4 * place + 1] is not None]
        if not quantised:
            return 0
        size = max(quantised) * itemsize + _block_maxima(max(quantised))
        self.largest_decoded = max(self.largest_decoded, size)
        return size


def _block_maxima(elements: int) -> int:
    return _FLOAT32 * -(-elements // BLOCK)


def _attention_backward(padded: int, tokens: int, heads: int, kv_heads: int, width: int, itemsize: int) -> int:
    """`padded`: tokens with each document rounded up."""
    step = 32 if width <= 128 else 64
    sums = _FLOAT32 * padded * heads * (-(-width // step) * step + 1)
    expanded = 2 * itemsize * tokens * heads * width if kv_heads != heads else 0
    return sums + expanded
