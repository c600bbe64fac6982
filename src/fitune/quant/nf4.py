"""NF4 with double quantisation, in bitsandbytes' numbers and bitsandbytes' serialised layout.

A weight of n elements is 4-bit codes [ceil(n/2), 1], one 8-bit code per block of 64 for its absmax, and one
float32 per 256 of those (QLoRA, arXiv 2305.14314, section 3): 4 + 8/64 + 32/(64*256) = 4.127 bits a weight.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fitune.kernels import contract
from fitune.kernels.reference import BLOCK, NESTED_BLOCK, NF4_VALUES

STATE_KEY = "quant_state.bitsandbytes__nf4"
# What a quantised `weight` becomes in a checkpoint: `weight` itself holds the codes.
SUFFIXES = ("absmax", "nested_absmax", "quant_map", "nested_quant_map", STATE_KEY)


def _make_dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending (arXiv 1511.04561; 2110.02861, section 2)."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


# Made at import: made later, it might be made under fake tensors and stay fake.
DYNAMIC_MAP = _make_dynamic_map()


@functools.cache
def _dynamic_lookup() -> Tensor:
    """[65536] uint8: the code of every value on the grid -1, -1 + 2/65535, ..., 1.

    bitsandbytes' CPU quantiser reads its codes from such a grid instead of searching for the nearest value, and
    so differs from it now and then, mostly near zero where the type is finer than the grid. We give its bits.
    """
    table = DYNAMIC_MAP
    grid = torch.arange(65536, dtype=torch.float32) / 65535.0 * 2.0 - 1.0
    return torch.bucketize(grid, (table[:-1] + table[1:]) / 2).to(torch.uint8)


@dataclass(frozen=True)
class NF4Weight:
    """A quantised matrix (or stack of matrices). All tensors may be views into a mapped file.

    Attributes:
        codes: [ceil(n/2), 1] uint8, the first weight of a pair in the high four bits.
        absmax: [ceil(n/64)] uint8 codes into `DYNAMIC_MAP`.
        nested_absmax: [ceil(n/64/256)] float32.
        offset: the mean that was taken off the block maxima before they were quantised.
        shape: of the weight, [out, in] or with leading dimensions.
        dtype: of the weight before it was quantised.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: float
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """What it takes, in bytes."""
        return self.codes.numel() + self.absmax.numel() + 4 * self.nested_absmax.numel()

    def dense(self, dtype: torch.dtype, backend: str) -> Tensor:
        """The weight decoded to `shape` in `dtype`."""
        table = DYNAMIC_MAP.to(self.codes.device)
        return contract.nf4_dequantise(
            self.codes, self.absmax, self.nested_absmax, table, self.offset, list(self.shape), dtype, backend
        )

    def serialised(self, name: str) -> dict[str, Tensor]:
        """The tensors of a bitsandbytes checkpoint for the parameter `name`."""
        state = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": self.offset,
        }
        return {
            name: self.codes,
            f"{name}.absmax": self.absmax,
            f"{name}.nested_absmax": self.nested_absmax,
            f"{name}.quant_map": torch.tensor(NF4_VALUES),
            f"{name}.nested_quant_map": DYNAMIC_MAP.clone(),
            f"{name}.{STATE_KEY}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }

    @classmethod
    def from_serialised(cls, name: str, tensors: Mapping[str, Tensor]) -> NF4Weight:
        """The inverse of `serialised`.

        Raises ValueError for a layout that is not NF4 with double quantisation in blocks of 64 and 256.
        """
        state = json.loads(bytes(tensors[f"{name}.{STATE_KEY}"].tolist()))
        if (
            state["quant_type"] != "nf4"
            or state["blocksize"] != BLOCK
            or state.get("nested_blocksize") != NESTED_BLOCK
        ):
            raise ValueError(f"{name} is not NF4 with double quantisation in blocks of {BLOCK}: {state}")
        return cls(
            codes=tensors[name],
            absmax=tensors[f"{name}.absmax"],
            nested_absmax=tensors[f"{name}.nested_absmax"],
            offset=float(state["nested_offset"]),
            shape=tuple(state["shape"]),
            dtype=getattr(torch, state["dtype"]),
        )


def double_quantise(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """absmax [m] float32 -> 8-bit codes [m], scales [ceil(m/256)] float32, offset.

    The offset is `absmax.mean()` as torch computes it (its last bit depends on torch's thread count).
    """
    offset = absmax.mean()
    m = absmax.numel()
    blocks = -(-m // NESTED_BLOCK)
    centred = absmax - offset
    if blocks * NESTED_BLOCK != m:
        centred = torch.nn.functional.pad(centred, (0, blocks * NESTED_BLOCK - m))
    centred = centred.view(blocks, NESTED_BLOCK)
    scales = centred.abs().amax(dim=1)
    scaled = centred.mul_((1.0 / scales).unsqueeze(1)).nan_to_num_(0.0).clamp_(-1, 1)
    # (x + 1) / 2 * 65535, rounded: halving is exact, so one product has the bits of two
    grid = scaled.add_(1.0).mul_(32767.5).add_(0.5).int()
    codes = torch.index_select(_dynamic_lookup().to(absmax.device), 0, grid.view(-1)).view(blocks, NESTED_BLOCK)
    # Where all maxima are alike the scale is 0 and any code decodes to the offset; bitsandbytes writes 0.
    codes.masked_fill_((scales == 0).unsqueeze(1), 0)
    codes = codes.view(-1)[:m]
    return codes, scales, float(offset)


def quantise(weight: Tensor, backend: str) -> NF4Weight:
    """A float weight of any shape -> its NF4 form with double-quantised scales."""
    codes, absmax = contract.nf4_quantise(weight, backend)
    nested_codes, nested_absmax, offset = double_quantise(absmax)
    return NF4Weight(codes, nested_codes, nested_absmax, offset, tuple(weight.shape), weight.dtype)
