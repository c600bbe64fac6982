"""What the optimizers know of a parameter before its first step, made in memory that the caller chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fitune.quant.moments import MOMENT_BLOCK

# Smaller tensors keep float32 moments, as bitsandbytes does: they cost nothing, and norms and biases are sensitive.
LEAST_8BIT_SIZE = 4096


class Zeros(Protocol):
    """Makes a tensor of zeros somewhere."""

    def __call__(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor: ...


# A parameter, and where its states' memory comes from -> its states by name.
Fresh = Callable[[Tensor, Zeros], dict[str, Any]]


def in_memory(device: torch.device) -> Zeros:
    """Zeros in the ordinary memory of a device."""
    return lambda shape, *, dtype: torch.zeros(shape, dtype=dtype, device=device)


def fresh_adamw(parameter: Tensor, zeros: Zeros) -> dict[str, Any]:
    """The states of torch.optim.AdamW, by its names, as it makes them itself."""
    return {"step": torch.zeros(()), **_alike(parameter, zeros, ("exp_avg", "exp_avg_sq"))}


def fresh_adamw8bit(parameter: Tensor, zeros: Zeros) -> dict[str, Any]:
    """The states of `AdamW8bit`."""
    count = parameter.numel()
    if count < LEAST_8BIT_SIZE:
        return {"step": 0, **_alike(parameter, zeros, ("moment1", "moment2"))}
    blocks = -(-count // MOMENT_BLOCK)
    codes = {name: zeros((count,), dtype=torch.uint8) for name in ("codes1", "codes2")}
    peaks = {name: zeros((blocks,), dtype=torch.float32) for name in ("absmax1", "absmax2")}
    return {"step": 0, **codes, **peaks}


def fresh_lion(parameter: Tensor, zeros: Zeros) -> dict[str, Any]:
    """The states of `Lion`."""
    return {"step": 0, **_alike(parameter, zeros, ("momentum",))}


def fresh_adafactor(parameter: Tensor, zeros: Zeros) -> dict[str, Any]:
    """The states of transformers' Adafactor, by its names: of a matrix its rows and its columns, else all of it."""
    shape = tuple(parameter.shape)
    state: dict[str, Any] = {"step": 0, "RMS": torch.zeros((), device=parameter.device)}
    if len(shape) < 2:
        return {**state, **_alike(parameter, zeros, ("exp_avg_sq",))}
    return {
        **state,
        "exp_avg_sq_row": zeros(shape[:-1], dtype=parameter.dtype),
        "exp_avg_sq_col": zeros((*shape[:-2], shape[-1]), dtype=parameter.dtype),
    }


FRESH: dict[str, Fresh] = {
    "adamw": fresh_adamw, "adamw8bit": fresh_adamw8bit, "lion": fresh_lion, "adafactor": fresh_adafactor,
}  # fmt: skip
# Those that change every element by itself: their states can be taken a slice at a time.
ELEMENT_WISE = ("adamw", "adamw8bit", "lion")


def _alike(parameter: Tensor, zeros: Zeros, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Zeros that lie in memory as the parameter does."""
    shape, strides = tuple(parameter.shape), parameter.stride()
    return {name: zeros(shape, dtype=parameter.dtype).as_strided(shape, strides) for name in names}
