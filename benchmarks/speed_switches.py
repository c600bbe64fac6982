"""The parts of fitune that make it fast, each with a way to do without it: the rows of `ablation.py`.

fitune has no switches for this. A part is taken away in a worker's process before the model is built, by putting
something else in its place from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import speed_torch_attention
from speed_rounds import Recompute

from fitune.fuse import head, model
from fitune.fuse import replace as replacing
from fitune.kernels import contract, int8_products_native, native, products_native
from fitune.train import prepare

Patch = Callable[[Any, str, Any], None]  # as setattr

DOT_PRODUCTS = ("amx", "avx512_bf16")  # instruction sets with dot products of bfloat16
OLDER = "avx512"
REASON = "switched off by the benchmark"


def _nothing(patch: Patch) -> None:
    """What is switched is in the environment or in the run file."""


@dataclass(frozen=True)
class Switch:
    """A part that can be switched off.

    Attributes:
        apply: does it, in the process that will build the model.
        lost: parts of the fusion report that are not replaced any more.
        beside: the row from which this one differs by its part alone, where that is not everything on.
        note: what else changes.
        environment: of the process.
        needs: instruction sets of which the machine's best must be one; none: any.
    """

    name: str
    apply: Callable[[Patch], None] = _nothing
    lost: frozenset[str] = frozenset()
    beside: str | None = None
    note: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    recompute: Recompute = "none"
    needs: tuple[str, ...] = ()

    def obstacle(self) -> str | None:
        """Why there is nothing to switch off on this machine; None: there is."""
        best = native.status().instruction_set
        if not self.needs or best in self.needs:
            return None
        return f"this machine's kernels are {best}, without it"


def without_layers(patch: Patch) -> None:
    patch(replacing, "replace_layers", lambda *_: (0, {"every layer": REASON}))


def without_mlp(patch: Patch) -> None:
    patch(replacing, "fused_mlp_candidates", lambda *_: [])


def without_norms(patch: Patch) -> None:
    patch(replacing, "fused_norm_candidates", lambda *_: [])


def without_linears(patch: Patch) -> None:
    """PEFT's hook for custom layers gets None, and makes its own."""
    patch(prepare, "fused_lora_layer", lambda *_, **__: None)


def without_products(patch: Patch) -> None:
    """The operators find no native functions, and go to their reference with native decoding."""
    for module in (products_native, int8_products_native):
        patch(module, "_products", lambda: None)


def without_attention(patch: Patch) -> None:
    for name in ("attention", "attention_backward"):
        patch(contract, name, getattr(speed_torch_attention, name))


def without_chunks(patch: Patch) -> None:
    patch(head, "chunk_tokens", lambda vocabulary, itemsize: 1 << 62)


def without_head(patch: Patch) -> None:
    patch(model, "_find_logit_form", lambda fused: REASON)


class _OlderAttention:
    """The best instruction set's functions, but an older one's attention."""

    def __init__(self, best: Any, older: Any) -> None:
        self._best, self._older = best, older

    def __getattr__(self, name: str) -> Any:
        return getattr(self._older if name.startswith("attention") else self._best, name)


def without_bfloat16_attention(patch: Patch) -> None:
    for module in (products_native, int8_products_native):
        module.available()  # looks into the table once
    best, state, library = native._load()
    older = library.fitune_kernels(OLDER.encode()).contents
    patch(native, "_table", lambda: _OlderAttention(best, older))
    # By this the attention's caller divides the work among threads.
    patch(native, "status", lambda: replace(state, instruction_set=OLDER))


def without_everything(patch: Patch) -> None:
    for switch in SWITCHES:
        if switch.name != ALL:
            switch.apply(patch)


LAYERS, MLP, NORMS, LINEARS = "layers as one node", "fused MLP", "fused norms", "LoRA in the product"
PRODUCTS, ATTENTION, CHUNKS, HEAD = "native products", "document attention", "head in chunks", "fused head"
BFLOAT16_ATTENTION, BFLOAT16_SET, TILES = "bfloat16 attention", "bfloat16 instructions", "tiles (AMX)"
KEPT, ALL = "activations kept", "all of these"
NO_MLP, NO_LINEARS = frozenset({"layer", "mlp"}), frozenset({"layer", "mlp", "linear"})

SWITCHES = (
    Switch(LAYERS, without_layers, frozenset({"layer"}), note="its parts are replaced one by one"),
    Switch(MLP, without_mlp, NO_MLP, beside=LAYERS, note="layers are not replaced whole either"),
    Switch(NORMS, without_norms, frozenset({"layer", "norm"}), beside=LAYERS, note="nor are layers whole"),
    Switch(LINEARS, without_linears, NO_LINEARS, beside=MLP, note="PEFT's layers; nor MLPs, nor layers whole"),
    Switch(PRODUCTS, without_products, needs=DOT_PRODUCTS, note="weights are decoded, then torch.mm"),
    Switch(ATTENTION, without_attention, note="torch's attention kernel instead"),
    Switch(BFLOAT16_ATTENTION, without_bfloat16_attention, needs=DOT_PRODUCTS, note="our float32 kernel instead"),
    Switch(CHUNKS, without_chunks, note="all logits of a step at once"),
    Switch(HEAD, without_head, frozenset({"head"}), note="the model's logits, log-softmax and autograd"),
    Switch(
        TILES,
        environment={"FITUNE_INSTRUCTION_SET": "avx512_bf16"},
        needs=("amx",),
        note="FITUNE_INSTRUCTION_SET=avx512_bf16: products and attention in registers",
    ),
    Switch(
        BFLOAT16_SET,
        environment={"FITUNE_INSTRUCTION_SET": OLDER},
        beside=PRODUCTS,
        needs=DOT_PRODUCTS,
        note="FITUNE_INSTRUCTION_SET=avx512: attention in float32, and no native products",
    ),
    Switch(KEPT, recompute="layers", note="train.recompute: layers"),
    Switch(
        ALL,
        without_everything,
        NO_LINEARS | {"norm", "head"},
        note="but for the last three: transformers' graph, PEFT's layers, our NF4 decoding",
    ),
)


def switch_off(name: str, patch: Patch = setattr) -> None:
    """Takes a part away from this process. Raises KeyError for a name that is not in the table."""
    {switch.name: switch for switch in SWITCHES}[name].apply(patch)
