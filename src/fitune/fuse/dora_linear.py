"""DoRA (weight-decomposed LoRA, arXiv 2402.09353) on a frozen layer, as one autograd node.

The direction of each row of a weight is that of W + s B A, and its length m learns apart:

    y = m / |W + s B A| (W + s B A) x

As in the paper's section 4.3 (and PEFT) no gradient goes through the lengths |W + s B A|. They need no dense weight:

    |W_j + s B_j A|^2 = |W_j|^2 + 2 s B_j (W A^T)_j + s^2 B_j (A A^T) B_j^T

The first is measured once, the second is a product with R rows, the third is small.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from fitune.fuse.lora_linear import FusedLoraLinear
from fitune.fuse.lora_product import SharedProduct
from fitune.quant.linear import QuantisedLinear, held_once, product_alone

# Rows that are handled in float32 at one time.
_ROWS = 256
# Below this a row of the weight is zero, and its direction none.
_LEAST_SQUARE = 1e-30


class _Dora(DoraLinearVariant):
    """PEFT's variant, whose lengths are measured without a dense weight that PEFT could ask the layer for."""

    @staticmethod
    def init(module: FusedDoraLinear, adapter_name: str, **kwargs: Any) -> None:
        if "row_squares" not in module._buffers:
            module.register_buffer("row_squares", module.measured_rows(), persistent=False)
        if adapter_name not in module.lora_magnitude_vector:
            module.lora_magnitude_vector[adapter_name] = DoraLinearLayer(fan_in_fan_out=False)
            module.lora_magnitude_vector[adapter_name].weight = nn.Parameter(torch.zeros(module.out_features))
        module.measure(adapter_name)


class FusedDoraLinear(FusedLoraLinear):
    """A LoRA layer with a magnitude for each output, whose fused pass covers one active adapter, dropout included.

    A buffer `row_squares` [N] float32 holds |W_j|^2; it is measured when the layer is made, and saved nowhere.
    """

    # Scales of the last forward in evaluation, with the state of the parameters that they were made of.
    _kept: tuple[tuple[Any, ...], Tensor] | None = None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): _Dora}

    def measured_rows(self) -> Tensor:
        """|W_j|^2 of the frozen weight [N], float32."""
        base = self.get_base_layer()
        dtype = base.stored.dtype if isinstance(base, QuantisedLinear) else base.weight.dtype
        with torch.no_grad(), held_once(base, dtype) as weight:
            return torch.cat([rows.float().square().sum(1) for rows in weight.split(_ROWS)])

    @torch.no_grad()
    def measure(self, adapter: str) -> None:
        """Sets the magnitudes to the lengths of the rows of W + s B A, so that they have no effect."""
        a, b, scaling = self.factors(adapter)
        base = self.get_base_layer()
        dtype = base.stored.dtype if isinstance(base, QuantisedLinear) else base.weight.dtype
        self.lora_magnitude_vector[adapter].weight.copy_(self._lengths(a, b, scaling, dtype))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N]."""
        adapter = self._adapter_alone()
        if adapter is None or args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        dropout = self.lora_dropout[adapter]
        flat = x.reshape(-1, x.shape[-1])
        if self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            # As PEFT: the base's part is of the whole input, and what DoRA makes of it of the rest.
            base = self.get_base_layer()
            dropped = dropout(flat)
            y = base(flat) + (self._computed(dropped, adapter, adds_bias=False) - product_alone(dropped, base))
        else:
            y = self._computed(flat, adapter, adds_bias=True)
        return y.view(*x.shape[:-1], -1)

    def _adapter_alone(self) -> str | None:
        """The adapter the fused pass can compute with now; None: none, or something it does not cover."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        return str(active[0]) if isinstance(self.lora_variant.get(active[0]), _Dora) else None

    def _computed(self, x: Tensor, adapter: str, adds_bias: bool) -> Tensor:
        """x [M, K] -> [M, N]."""
        a, b, scaling = self.factors(adapter)
        magnitude = self.lora_magnitude_vector[adapter].weight
        bias = self.get_base_layer().bias if adds_bias else None
        if torch.is_grad_enabled() or self.training:
            self._kept = None
            lengths = self._lengths(a.detach(), b.detach(), scaling, x.dtype)
            y: Tensor = _DoraLinear.apply(x, self.get_base_layer(), a, b, magnitude, lengths, scaling, bias)
            return y
        product = _product(self.get_base_layer(), a, b, scaling, x.dtype)
        return _scaled(product.forward(x)[0][0], self._kept_scales(a, b, magnitude, scaling, x.dtype), bias)

    def _kept_scales(self, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        """m / |W + s B A| [N], made once for all tokens that are generated."""
        state = (*((one._version, one.untyped_storage()._cdata) for one in (a, b, magnitude)), dtype)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, magnitude.detach() / self._lengths(a, b, scaling, dtype))
        return self._kept[1]

    def train(self, mode: bool = True) -> FusedDoraLinear:
        """As `nn.Module.train`; what was kept for generation is forgotten."""
        self._kept = None
        super().train(mode)
        return self

    @torch.no_grad()
    def _lengths(self, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        """|W_j + s B_j A| [N], float32, with A [R, K] and B [N, R] in `dtype` as the product takes them."""
        base = self.get_base_layer()
        taken = a.to(dtype)
        alone = SharedProduct((base,), (1.0,), [None, None], _backend(base), adds_bias=False)
        across = alone.forward(taken)[0][0].t().float()
        a, b = taken.float(), (b * scaling).to(dtype).float()
        squares = self.row_squares + (2 * across + b @ (a @ a.t())).mul_(b).sum(1)
        return squares.clamp_(min=_LEAST_SQUARE).sqrt_()


class UnmeasuredDoraLinear(FusedDoraLinear):
    """The same for dry runs: the weight is not read."""

    def measured_rows(self) -> Tensor:
        return torch.ones(self.out_features)

    def measure(self, adapter: str) -> None:
        pass


def _backend(base: nn.Linear) -> str:
    return base.backend if isinstance(base, QuantisedLinear) else "reference"


def _product(base: nn.Linear, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> SharedProduct:
    return SharedProduct.of([(base, scaling)], [a, b], dtype, _backend(base), adds_bias=False)


def _scaled(product: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """product [M, N] * scales [N] + bias [N], computed in float32: scales near 1 would be 1 in 16 bits."""
    made = torch.empty_like(product)
    for rows, into in zip(product.split(_ROWS), made.split(_ROWS), strict=True):
        wide = rows * scales
        into.copy_(wide if bias is None else wide.add_(bias))
    return made


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, magnitude: Tensor, lengths: Tensor,
        scaling: float, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        product = _product(base, a, b, scaling, x.dtype)
        (made,), (u,) = product.forward(x)
        ctx.product = product
        ctx.save_for_backward(x, u, made, magnitude, lengths)
        return _scaled(made, magnitude / lengths, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, u, made, magnitude, lengths = ctx.saved_tensors
        product: SharedProduct = ctx.product
        grad_magnitude = torch.zeros_like(lengths)
        for rows, grads in zip(made.split(_ROWS), grad_out.split(_ROWS), strict=True):
            grad_magnitude += (rows.float() * grads).sum(0)
        grad_out = _scaled(grad_out, magnitude / lengths, None)
        grad_x, vs = product.grad_input([grad_out])
        grad_a, grad_b = product.grad_adapters([grad_out], x, [u], vs)
        return grad_x, None, grad_a, grad_b, grad_magnitude.div_(lengths), None, None, None
