"""A fused decoder layer for one new token of each row as a single native call.

Packed once for a key-value cache with slots, and right for as long as that cache lives: meanwhile neither adapters
nor frozen weights may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fitune.fuse.lora_product import SharedProduct
from fitune.fuse.norm import FusedNorm
from fitune.kernels import decode_native
from fitune.kernels.decode_native import DecodeForm, DecodeLayer, Norm
from fitune.kernels.segments import ranks, segments
from fitune.quant.lease import DecodedAtUse
from fitune.quant.linear import QuantisedLinear

if TYPE_CHECKING:
    from fitune.fuse.decoder_layer import FusedLayer


class SlotLike(Protocol):
    """A cache whose rows lie in slots, as generate/slot_cache.py has it.

    Attributes:
        columns: where each row's new token goes, int64 [n].
        shared: how many first columns are the same in all slots.
        kept: what layers keep for as long as the cache lives.
        layers: with `keys` and `values` [slots, K, capacity, D] each.
    """

    columns: Tensor
    shared: int
    kept: dict[Any, Any]
    layers: Sequence[Any]


def slots_of(cache: Any) -> SlotLike | None:
    """The cache as one with slots; None: it is another kind."""
    slots: SlotLike | None = cache if isinstance(getattr(cache, "kept", None), dict) else None
    return slots


def packed_step(
    layer: FusedLayer, products: Sequence[SharedProduct], dtype: torch.dtype, half: int, slots: SlotLike
) -> DecodeLayer | None:
    """The step of this layer; None where it cannot be taken natively.

    `products`: of queries, keys and values; of the output; of gate and up; of down. half: of the rotary embedding.
    """
    if layer.backend != "native" or dtype != torch.bfloat16 or not decode_native.available():
        return None
    bases = [base for product in products for base in product.bases]
    quantised = [base for base in bases if isinstance(base, QuantisedLinear)]
    if any(type(base.lease) is not DecodedAtUse or base.stored.stream is not None for base in quantised):
        return None  # a lease or a stream that moves weights gives them for one product at a time
    form, of_slots = layer.attention.form, slots.layers[layer.attention.module.layer_idx]
    if of_slots.keys.dtype != dtype:
        return None
    descriptors, frozen = [], []
    for product in products:
        ys, us = _rooms(slots, product, of_slots.keys.shape[0])
        with product.held(dtype) as (tensors, offsets):
            depth = product.bases[0].in_features
            descriptors.append(segments(tensors, offsets, product.factors, depth, ys, us))
        frozen.append((tensors, product.factors, ys, us))
    inputs, _, branches, _ = products
    shape = DecodeForm(
        heads=inputs.bases[0].out_features // form.head_dim,
        kv_heads=inputs.bases[1].out_features // form.head_dim,
        head_dim=form.head_dim,
        half=half if form.rotary else 0,
        turned_first=form.turned_first,
        activation=layer.mlp.activation,
        window=form.window,
        scale=form.scale,
        cap=form.cap,
        residual=layer.form.scale,
    )
    return DecodeLayer(
        [_norm(norm) for norm in layer.norms], [_norm(norm) for norm in layer.attention.norms], descriptors,
        inputs.bases[0].in_features, branches.bases[0].out_features, shape, of_slots.keys, of_slots.values, frozen,
    )  # fmt: skip


def _rooms(slots: SlotLike, product: SharedProduct, rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Room for the results of a product, the same for all layers of the same widths."""
    widths = tuple(base.out_features for base in product.bases)
    adapters = tuple(ranks(product.factors))
    place = ("room", widths, adapters, product.bases[0].in_features)
    if place not in slots.kept:
        slots.kept[place] = tuple(
            [torch.empty(rows, size, dtype=torch.bfloat16) for size in sizes] for sizes in (widths, adapters)
        )
    ys, us = slots.kept[place]
    return ys, us


def _norm(norm: FusedNorm | None) -> Norm | None:
    return None if norm is None else Norm(norm.weight.detach().to(torch.bfloat16).contiguous(), norm.eps, norm.shift)
