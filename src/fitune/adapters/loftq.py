"""LoftQ: an adapter that begins by making up for what its base lost to 4 bits (arXiv 2310.08659).

One step of it against the store as it is, as PEFT's `replace_lora_weights_loftq` does for quantised models: s B A is
the best approximation of rank R of W - NF4(W). The store stays what it is, and is shared with every other run.
"""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fitune.adapters.lora import ADAPTER
from fitune.errors import InputError
from fitune.models.conversion import GraphTensors
from fitune.models.graph import build_graph
from fitune.models.source import ModelSource
from fitune.quant.linear import QuantisedLinear
from fitune.quant.mapped_pages import give_back, is_mapped, spans_of
from fitune.quant.parameter import QuantisedParameter

# A whole singular value decomposition takes seconds up to here, and minutes a matrix in models of billions.
EXACT_SIDE = 1024
# Of the subspace iteration beyond (arXiv 0909.4061, algorithm 4.4), on twice the rank: on pure noise, whose singular
# values are as close as can be, it finds 99.4 % of what the best approximation of rank 16 does, and more of rank 64.
ITERATIONS = 16
_PREFIX = "base_model.model."


@torch.no_grad()
def make_up_for_four_bits(model: PeftModel, source: ModelSource, seed: int) -> None:
    """Sets A and B of every adapted layer of `model` whose weight is NF4; its 16-bit one is read from `source`.

    One group of checkpoint tensors is in memory at a time. `seed`: of what is random in it.

    Raises InputError where there is no such layer, or the checkpoint's own weights are these 4 bits.
    """
    graph = build_graph(source.config, torch.bfloat16)
    tensors, tied = GraphTensors(source, graph), graph.all_tied_weights_keys
    adapted: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and stored_weight(module) is not None:
            weight = f"{name.removeprefix(_PREFIX)}.weight"
            adapted.setdefault(weight if weight in tensors else tied[weight], []).append(module)
    generator = torch.Generator().manual_seed(seed)
    corrected = 0
    for group in tensors.groups:
        wanted = adapted.keys() & group.targets.keys()
        if not wanted or (group.is_renamed_only and source.nf4(group.sources[0]) is not None):
            continue
        values = tensors.read(group)
        for name in sorted(wanted):
            for module in adapted[name]:
                corrected += _correct(module, values[name], generator)
        source.release()
    if not corrected:
        raise InputError(
            f"{source.reference} has nothing that loftq could make up for: its adapted weights are in these very 4 "
            "bits already, or in no 4 bits at all; leave it out, or take the 16-bit model",
            where="lora.initial",
        )


def stored_weight(module: nn.Module) -> QuantisedParameter | None:
    """The NF4 weight under a LoRA layer; None where it has another."""
    base = module.get_base_layer()
    weight = base.stored if isinstance(base, QuantisedLinear) else base._modules.get("weight")
    return weight if isinstance(weight, QuantisedParameter) else None


def _correct(module: nn.Module, weight: Tensor, generator: torch.Generator) -> bool:
    """Whether there was a difference to `weight`, as the checkpoint has it."""
    stored = stored_weight(module)
    assert stored is not None
    lost = weight.float() - stored.nf4().dense(torch.float32, stored.backend)
    give_back(spans_of(tensor for tensor in stored.own_tensors() if is_mapped(tensor)))
    if not bool(lost.any()):
        return False
    if isinstance(module.get_base_layer(), Conv1D):
        lost = lost.t()
    down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    b, a = best_of_rank(lost, min(down.shape[0], *lost.shape), generator)
    down[: a.shape[0]].copy_(a)
    up.zero_()
    up[:, : b.shape[1]].copy_(b / module.scaling[ADAPTER])
    if ADAPTER in module.lora_magnitude_vector:
        module.measure(ADAPTER)  # DoRA's lengths are those of the corrected weight
    return True


def best_of_rank(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """matrix [N, K] float32 -> B [N, R] and A [R, K] whose product is nearest to it, its singular values halved
    between the two (by their roots) as in LoftQ and PiSSA."""
    if min(matrix.shape) <= max(EXACT_SIDE, 2 * rank):
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, values, v = _leading(matrix, 2 * rank, generator)
    roots = values[:rank].sqrt()
    return u[:, :rank] * roots, roots.unsqueeze(1) * v[:rank]


def _leading(matrix: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """About the first singular vectors [N, count], values and vectors [count, K], by subspace iteration."""
    basis = torch.randn(matrix.shape[1], count, generator=generator) / math.sqrt(matrix.shape[1])
    for _ in range(ITERATIONS):
        left, _ = torch.linalg.qr(matrix @ basis)
        basis, _ = torch.linalg.qr(matrix.t() @ left)
    u, values, v = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u, values, v @ basis.t()
