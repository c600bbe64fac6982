"""What every operator means, in plain torch: the definition that the native kernels are tested against.

Runs on any device. Statistics and element-wise work are in float32, results in the input's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# QLoRA (arXiv 2305.14314), appendix E: the 16 NF4 values, as bitsandbytes stores them.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
NESTED_BLOCK = 256


def nf4_quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.tensor(NF4_VALUES, device=weight.device)
    bounds = (values[:-1] + values[1:]) / 2
    flat = weight.reshape(-1).float()
    n = flat.numel()
    full = n - n % BLOCK
    blocks = flat[:full].view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1).reshape(-1)
    if n > full:  # bitsandbytes divides in a ragged last block
        last = flat[full:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last.view(1)])
        scaled = torch.cat([scaled, (flat[full:] / last).clamp(-1, 1)])
    if n % 2:
        scaled = F.pad(scaled, (0, 1))
    index = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return ((index[::2] << 4) | index[1::2]).unsqueeze(1), absmax


def nf4_dequantise(
    codes: Tensor, absmax_codes: Tensor, nested_absmax: Tensor, table: Tensor, offset: float,
    shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    values = torch.tensor(NF4_VALUES, device=codes.device)
    flat = codes.reshape(-1)
    index = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1).long()
    n = 1
    for size in shape:
        n *= size
    absmax = table[absmax_codes.long()] * nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax_codes.numel()]
    absmax = absmax + torch.tensor(offset, dtype=torch.float32, device=codes.device)
    return (values[index[:n]] * absmax.repeat_interleave(BLOCK)[:n]).to(dtype).view(shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    return (wide * rstd.unsqueeze(-1) * (shift + weight.float())).to(x.dtype), rstd


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None, shift: float
) -> Tensor:
    wide, r = x.float(), rstd.unsqueeze(-1)
    grad = grad_out.float() * (shift + weight.float())
    mean = (grad * wide).mean(dim=-1, keepdim=True)
    grad_x = (grad - wide * mean * r * r) * r
    return (grad_x if residual is None else grad_x + residual.float()).to(x.dtype)


def _activate(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Value and slope of the activation, float32."""
    if activation == "silu":
        s = torch.sigmoid(gate)
        return gate * s, s * (1 + gate * (1 - s))
    if activation == "gelu_tanh":
        a, b = 1.5957691216057308, 0.044715  # 2 sqrt(2 / pi): tanh(z) = 2 sigmoid(2z) - 1
        s = torch.sigmoid(a * (gate + b * gate**3))
        return gate * s, s + gate * s * (1 - s) * a * (1 + 3 * b * gate * gate)
    raise ValueError(f"no gated activation called {activation!r}")


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (_activate(gate.float(), activation)[0] * up.float()).to(gate.dtype)


def gated_activation_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    value, slope = _activate(gate.float(), activation)
    grad, wide_up = grad_out.float(), up.float()
    dtype = gate.dtype
    return (grad * wide_up * slope).to(dtype), (grad * value).to(dtype), (value * wide_up).to(dtype)


def token_logprob_(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    wide = logits.float()
    column = targets.unsqueeze(1)
    logprob = wide.log_softmax(dim=-1)
    chosen = logprob.gather(1, column).squeeze(1)
    if with_gradient:
        grad = logprob.exp_().neg_()
        grad.scatter_(1, column, 1 - chosen.exp().unsqueeze(1))
        logits.copy_(grad)
    return chosen


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    half = cos.shape[-1]
    c, s = cos.unsqueeze(1), (-sin if inverse else sin).unsqueeze(1)
    wide = x.float()
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1).to(x.dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    x.copy_(rotate(x, cos, sin, inverse))


def _document_parts(document: list[int], window: int, device: torch.device) -> tuple[int, slice, Tensor, Tensor]:
    """Row, own tokens, indices of the keys [P + L] and which of them each of the L queries sees [L, P + L]."""
    row, start, stop, prefix_start, prefix_stop = document
    keys = torch.cat([torch.arange(prefix_start, prefix_stop), torch.arange(start, stop)]).to(device)
    prefix = prefix_stop - prefix_start
    position = torch.arange(prefix + stop - start, device=device)
    distance = position[prefix:].unsqueeze(1) - position
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    return row, slice(start, stop), keys, seen


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float, cap: float) -> Tensor:
    """q [L, H, D], k [S, K, D] -> [H, L, S] float32, bent to at most `cap` (0: not), -inf where not seen."""
    group = q.shape[1] // k.shape[1]
    wide = k.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("lhd,shd->hls", q.float(), wide) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return scores.masked_fill(~seen, float("-inf"))


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: float, cap: float = 0.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, tokens, heads, _ = q.shape
    group = heads // k.shape[2]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.zeros(rows, heads, tokens, device=q.device)
    for document in documents.tolist():
        row, own, keys, seen = _document_parts(document, window, q.device)
        scores = _scores(q[row, own], k[row, keys], seen, scale, cap)
        lse[row, :, own] = scores.logsumexp(-1)
        values = v[row, keys].float().repeat_interleave(group, dim=1)
        out[row, own] = torch.einsum("hls,shd->lhd", scores.softmax(-1), values).to(out.dtype)
    return out, lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Tensor, window: int,
    scale: float, cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    group = q.shape[2] // k.shape[2]
    grad_q = torch.zeros(q.shape, device=q.device)
    grad_k, grad_v = (torch.zeros(k.shape, device=k.device) for _ in range(2))
    for document in documents.tolist():
        row, own, keys, seen = _document_parts(document, window, q.device)
        scores = _scores(q[row, own], k[row, keys], seen, scale, cap)
        weights = (scores - lse[row, :, own].unsqueeze(-1)).exp()
        grad = grad_out[row, own].float()
        values = v[row, keys].float().repeat_interleave(group, dim=1)
        delta = (grad * out[row, own].float()).sum(-1).t().unsqueeze(-1)
        slopes = weights * (torch.einsum("lhd,shd->hls", grad, values) - delta) * scale
        if cap:
            slopes = slopes * (1 - (scores.masked_fill(~seen, 0.0) / cap) ** 2)
        wide_keys = k[row, keys].float().repeat_interleave(group, dim=1)
        grad_q[row, own] = torch.einsum("hls,shd->lhd", slopes, wide_keys)
        for into, part, other in ((grad_k, slopes, q[row, own].float()), (grad_v, weights, grad)):
            each = torch.einsum("hls,lhd->shd", part, other)
            into[row].index_add_(0, keys, each.unflatten(1, (-1, group)).sum(2))
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def slot_attention_(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, columns: Tensor, shared: int, window: int,
    scale: float, cap: float,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(q)
    for row, column in enumerate(columns.tolist()):
        keys[row, :, column], values[row, :, column] = k[row], v[row]
        seen = slice(max(0, column + 1 - window) if window else 0, column + 1)
        own_keys, own_values = keys[row, :, seen].transpose(0, 1), values[row, :, seen].float()
        everything = torch.ones(1, own_keys.shape[0], dtype=torch.bool, device=q.device)
        weights = _scores(q[row : row + 1], own_keys, everything, scale, cap).softmax(-1)
        group = q.shape[1] // k.shape[1]
        out[row] = torch.einsum("hls,hsd->lhd", weights, own_values.repeat_interleave(group, 0))[0].to(out.dtype)
    return out


def add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return (x.float() + scale * y.float()).to(x.dtype)


def adamw8bit_(
    parameter: Tensor, grad: Tensor, codes1: Tensor, codes2: Tensor, absmax1: Tensor, absmax2: Tensor, map1: Tensor,
    map2: Tensor, settings: list[float],
) -> None:  # fmt: skip
    beta1, rest1, beta2, rest2, eps, keep, rate, correction = settings
    flat = grad.reshape(-1)
    first = _decoded_moment(codes1, absmax1, map1) * beta1 + flat * rest1
    second = _decoded_moment(codes2, absmax2, map2) * beta2 + flat * flat * rest2
    change = rate * (first / (second.sqrt() / correction + eps))
    parameter.copy_(parameter * keep - change.view(parameter.shape))
    for moment, codes, absmax, words in ((first, codes1, absmax1, map1), (second, codes2, absmax2, map2)):
        _encode_moment(moment, codes, absmax, words)


def _decoded_moment(codes: Tensor, absmax: Tensor, words: Tensor) -> Tensor:
    return words[:256][codes.long()] * absmax.repeat_interleave(NESTED_BLOCK)[: codes.numel()]


def _encode_moment(moment: Tensor, codes: Tensor, absmax: Tensor, words: Tensor) -> None:
    blocks = F.pad(moment, (0, -moment.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax.copy_(blocks.abs().amax(dim=1))
    divisors = torch.where(absmax > 0, absmax, 1.0)
    scaled = (blocks / divisors.unsqueeze(1)).reshape(-1)[: moment.numel()]
    codes.copy_(torch.bucketize(scaled, words[256:511]).to(torch.uint8))
