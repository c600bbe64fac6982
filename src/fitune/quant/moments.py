"""The optimizer's moments in 8 bits: blocks of 256 values, a float32 peak each, and bitsandbytes' two maps of codes.

`MAPS` are as the kernel takes them (csrc/fitune_kernels.h): values, the middles between neighbours, and where a
float32 with given high 16 bits lies among them. A value gets the code of the nearest of its map, as on bitsandbytes'
GPU path, but a second moment above zero never becomes zero: the first moment would be divided by nothing
(docs/log.md). bitsandbytes' CPU path reads codes from a grid of 65536 places, coarser than the maps near zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fitune.quant.nf4 import DYNAMIC_MAP

MOMENT_BLOCK = 256


def _make_unsigned_map() -> Tensor:
    """The 256 values of the dynamic 8-bit type without a sign, ascending (arXiv 2110.02861, section 2)."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1, dtype=torch.float32)
        values += (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _map_words(values: Tensor) -> Tensor:
    """A map as the kernel takes it, [256 + 256 + 65536] words of 4 bytes."""
    middles = (values[:-1] + values[1:]) / 2
    if values[0] == 0:
        middles[0] = 0  # what is above it gets another code
    high = torch.arange(65536, dtype=torch.int64)
    low = torch.where(high >= 32768, 0xFFFF, 0)  # of a negative number the least has the greatest low bits
    least = ((high << 16) | low).to(torch.uint32).view(torch.float32).nan_to_num(0.0).clamp(-1.0, 1.0)
    guesses = torch.bucketize(least, middles, out_int32=True)
    return torch.cat([values, middles, torch.tensor([torch.inf]), guesses.view(torch.float32)])


# Made at import: made later, they might be made under fake tensors and stay fake.
UNSIGNED_MAP = _make_unsigned_map()
MAPS = (_map_words(DYNAMIC_MAP), _map_words(UNSIGNED_MAP))
