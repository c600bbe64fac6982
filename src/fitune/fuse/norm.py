"""RMSNorm as one operator each way, saving its input and one number a row."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fitune.kernels import contract


class FusedNorm(nn.Module):
    """x -> x / sqrt(mean(x^2) + eps) * (shift + weight), statistics in float32.

    The parameter is the replaced module's own and keeps its name.
    """

    def __init__(self, weight: nn.Parameter, eps: float, shift: float, backend: str) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.shift = shift
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        out: Tensor = _Norm.apply(x, self.weight, self.eps, self.shift, self.backend)
        return out

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, shift={self.shift}"


def fused_norm_candidates(module: nn.Module, backend: str) -> list[FusedNorm]:
    """What `module` may be if it has the structure of an RMSNorm: one vector, an epsilon, no children, no bias.

    The two candidates differ in what they add to the weight (0, or 1 as Gemma does); behaviour decides.
    """
    parameters = dict(module.named_parameters(recurse=False))
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(parameters) != ["weight"] or list(module.children()) or list(module.buffers(recurse=False)):
        return []
    if parameters["weight"].dim() != 1 or not isinstance(eps, float):
        return []
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate, a residual: more than a norm
        return []
    return [FusedNorm(parameters["weight"], eps, shift, backend) for shift in (0.0, 1.0)]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, shift: float, backend: str) -> Tensor:
        out, rstd = contract.rms_norm(x, weight, eps, shift, backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.shift, ctx.backend = shift, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x = contract.rms_norm_backward(grad_out, x, weight, rstd, None, ctx.shift, ctx.backend)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            rows = (grad_out.float() * x.float() * rstd.unsqueeze(-1)).reshape(-1, x.shape[-1])
            grad_weight = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, None, None, None
