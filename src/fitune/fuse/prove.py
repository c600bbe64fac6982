"""The proof that a fused part computes what the original computes: outputs and gradients, on the spot.

Both are run on random inputs in float32 and compared; then in the dtype of the computation, where the fused part
may be at most twice as far from float32 as the original is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

TOKENS = 24
# float32 against float32: orders of summation differ, formulas do not (a wrong epsilon shows at 1e-3 and more).
TOLERANCE = 1e-4
# Inputs of ordinary size, so small that an RMSNorm's epsilon carries weight, and so large that small weights reach
# the part of an activation where it differs from its likes.
INPUT_SCALES = (1.0, 2e-3, 30.0)


@dataclass(frozen=True)
class Verdict:
    """Whether the parts agree, and the largest relative error seen (or why they could not be compared)."""

    holds: bool
    reason: str


def prove(
    original: nn.Module, fused: nn.Module, width: int, dtype: torch.dtype, tokens: int = TOKENS
) -> Verdict:  # fmt: skip
    """Compares two modules of x [1, T, width] -> [1, T, width] that share their parameters; T is `tokens`."""
    worst = 0.0
    for scale in INPUT_SCALES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, tokens, width, generator=generator) * scale
        grad = torch.randn(1, tokens, width, generator=generator)
        try:
            exact = _run(original, x, grad, torch.float32)
            ours = _run(fused, x, grad, torch.float32)
            narrow = _run(original, x, grad, dtype), _run(fused, x, grad, dtype)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            return Verdict(False, f"cannot be compared: {error}")
        if len(exact) != len(ours):
            return Verdict(False, "gradients of different parameters")
        for number, (expected, found) in enumerate(zip(exact, ours, strict=True)):
            distance = _distance(found, expected)
            worst = max(worst, distance)
            if not distance <= TOLERANCE:
                return Verdict(False, f"differs by {distance:.1e} in float32")
            own = _distance(narrow[0][number], expected)
            if not math.isfinite(own) and scale != INPUT_SCALES[0]:
                continue  # the original overflows with such inputs (float16): there is nothing to compare with
            allowed = 2 * own + TOLERANCE
            if not _distance(narrow[1][number], expected) <= allowed:
                return Verdict(False, f"more than twice the original's own error in {dtype}")
    return Verdict(True, f"agrees within {worst:.1e} in float32")


def _run(module: nn.Module, x: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradients of the input and of every trainable parameter, float32."""
    inputs = x.to(dtype).requires_grad_(True)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        out = functional_call(module, _widened(module, dtype), (inputs,))
        gradients = torch.autograd.grad(out, [inputs, *trainable], grad.to(out.dtype))
    return [out.detach().float(), *(gradient.float() for gradient in gradients)]


def _widened(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """16-bit frozen weights in float32, where that is what is computed in: torch's own layers do not mix the two."""
    if dtype != torch.float32:
        return {}
    narrow = (torch.bfloat16, torch.float16)
    frozen = ((name, p) for name, p in module.named_parameters() if not p.requires_grad and p.dtype in narrow)
    return {name: p.detach().to(dtype) for name, p in frozen}


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@contextmanager
def with_trained_adapter(module: nn.Module) -> Iterator[None]:
    """For the length of a proof, gives every LoRA B of `module` values: at zero they would prove nothing."""
    factors = [p for name, p in module.named_parameters() if "lora_B" in name and p.dim() == 2]
    saved = [factor.detach().clone() for factor in factors]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in factors:
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for factor, values in zip(factors, saved, strict=True):
                factor.copy_(values)
