"""The output head and the log-probability of each target token, without ever holding all logits.

Rows are taken a chunk at a time: logits [chunk, V], log-probabilities, and at once the gradient of each row's
log-probability with respect to its hidden state. What the loss makes of the log-probabilities (cross-entropy,
preference objectives, weights) only scales those rows in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitune.kernels import contract, products
from fitune.quant.nf4 import DYNAMIC_MAP

# Logits that exist at one time: as many rows as fit in here, but enough to keep a matrix product at full speed, and
# no more than it gains from (the head's weight is read once for every chunk).
CHUNK_BYTES = 32 << 20
FEWEST_CHUNK_TOKENS, MOST_CHUNK_TOKENS = 128, 512
# A last chunk is filled up with zeros to a multiple of this: the CPU library compiles each new shape of product, and
# keeps it for good (docs/log.md).
CHUNK_STEP = 32


@dataclass(frozen=True)
class LogitForm:
    """What a model makes of the head's products x before they are logits: scale * x, bent to at most `cap`.

    With a cap: cap * tanh(scale * x / cap). 0: none.
    """

    scale: float = 1.0
    cap: float = 0.0

    def apply(self, products: Tensor) -> Tensor:
        """Logits, for comparison."""
        scaled = products * self.scale
        return self.cap * torch.tanh(scaled / self.cap) if self.cap else scaled


PLAIN_LOGITS = LogitForm()


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, backend: str, form: LogitForm = PLAIN_LOGITS
) -> Tensor:  # fmt: skip
    """hidden [N, C], head weight [V, C], targets [N] -> log p(target | hidden) [N], float32, differentiable."""
    if form.scale != 1.0:
        hidden = hidden * form.scale
        bias = None if bias is None else bias * form.scale
    out: Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets, backend, form.cap)
    return out


def chunk_tokens(vocabulary: int, itemsize: int) -> int:
    """How many rows go through the head at a time."""
    fitting = CHUNK_BYTES // (vocabulary * itemsize) // CHUNK_STEP * CHUNK_STEP
    return min(max(fitting, FEWEST_CHUNK_TOKENS), MOST_CHUNK_TOKENS)


def _products(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """hidden [n, C] -> [n, V]."""
    frozen, table = [weight, None, None, bias], DYNAMIC_MAP.to(hidden.device)
    made: Tensor = products.frozen_product(hidden, frozen, [0.0], [weight.shape[0]], [None, None], table, backend)[0]
    return made


def _products_back(slopes: Tensor, weight: Tensor, backend: str) -> Tensor:
    """slopes [n, V] -> [n, C]."""
    frozen, table, depth = [weight, None, None, None], DYNAMIC_MAP.to(slopes.device), weight.shape[1]
    made: Tensor = products.frozen_product_backward([slopes], frozen, [0.0], depth, [None, None], table, backend)[0]
    return made


def _score(made: Tensor, targets: Tensor, with_gradient: bool, backend: str, cap: float) -> Tensor:
    """The targets' log-probabilities [n]; the products become their gradient with respect to themselves if asked."""
    if not cap:
        logprob: Tensor = contract.token_logprob_(made, targets, with_gradient, backend)
        return logprob
    bent = torch.tanh(made.float() / cap)
    logits = (bent * cap).to(made.dtype)
    logprob = contract.token_logprob_(logits, targets, with_gradient, backend)
    if with_gradient:
        torch.mul(logits, (1 - bent.square_()).to(made.dtype), out=made)
    return logprob


def _filled_up(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of zeros after the last one, to a multiple of `CHUNK_STEP`."""
    more = -hidden.shape[0] % CHUNK_STEP
    return (F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more))) if more else (hidden, targets)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, backend: str, cap: float
    ) -> Tensor:
        frozen = not any(ctx.needs_input_grad[1:3])
        matrix = weight.detach().to(hidden.dtype).contiguous()
        offset = None if bias is None else bias.detach().to(hidden.dtype)
        count = hidden.shape[0]
        hidden, targets = _filled_up(hidden, targets)
        logprob = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        wanted = ctx.needs_input_grad[0] and frozen
        slope = torch.empty_like(hidden) if wanted else None
        size = chunk_tokens(matrix.shape[0], matrix.element_size())
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            made = _products(hidden[rows], matrix, offset, backend)
            logprob[rows] = _score(made, targets[rows], wanted, backend, cap)
            if slope is not None:
                slope[rows] = _products_back(made, matrix, backend)
            del made  # before the next chunk's logits come
        ctx.backend, ctx.frozen, ctx.cap = backend, frozen, cap
        if frozen:
            ctx.save_for_backward(None if slope is None else slope[:count])
        else:  # the head learns: its gradient needs the loss's own scale, so the logits are made again
            ctx.save_for_backward(hidden, weight, bias, targets)
        return logprob[:count]

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.frozen:
            (slope,) = ctx.saved_tensors
            return slope * grad_logprob.unsqueeze(1).to(slope.dtype), None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        count = grad_logprob.shape[0]
        grad_logprob = F.pad(grad_logprob, (0, hidden.shape[0] - count))
        matrix = weight.detach().to(hidden.dtype).contiguous()
        offset = None if bias is None else bias.detach().to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        size = chunk_tokens(matrix.shape[0], matrix.element_size())
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            slopes = _products(hidden[rows], matrix, offset, ctx.backend)
            _score(slopes, targets[rows], True, ctx.backend, ctx.cap)
            slopes *= grad_logprob[rows].unsqueeze(1).to(slopes.dtype)
            grad_hidden[rows] = _products_back(slopes, matrix, ctx.backend)
            grad_weight += torch.mm(slopes.t(), hidden[rows])
            if grad_bias is not None:
                grad_bias += slopes.float().sum(0)
        bias_grad = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden[:count], grad_weight.to(weight.dtype), bias_grad, None, None, None
