"""Making a model's frozen products integer ones: which columns of each input stay out, and every layer's form.

Activations have a few columns that are tens of times larger than the rest (LLM.int8(), arXiv 2208.07339, section 3),
always the same ones: rounded to integers beside them the others would lose their digits. They are found by one pass
of the base model over training data, and keep 16 bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fitune.data.batch import Batch
from fitune.errors import InputError
from fitune.fuse.decoder_layer import FusedLayer
from fitune.fuse.gated_mlp import FusedGatedMLP
from fitune.fuse.int8_form import ColumnPeaks, Int8Form, attach
from fitune.fuse.lora_linear import FusedLoraLinear
from fitune.fuse.lora_product import SharedProduct
from fitune.fuse.model import FusedModel
from fitune.kernels import int8_products
from fitune.models.wrapped_part import original
from fitune.quant.linear import QuantisedLinear
from fitune.quant.nf4 import DYNAMIC_MAP
from fitune.quant.parameter import QuantisedParameter

# With 32 the error of SmolLM2-135M's LoRA gradients falls to less than half (tests/fuse/test_int8_calibration.py).
OUTLIERS = 32
# Enough that another batch names the same columns; a pass over more would cost a run a step and more.
CALIBRATION_TOKENS = 2048
PART = "int8"  # of a fusion report


def calibrate(
    model: FusedModel, batches: Iterable[Batch], outliers: int = OUTLIERS, forward: bool = True, backward: bool = True
) -> None:
    """From here on `model` is trained with products of frozen weights in integers; what is used stays as it was.

    Its adapter must still be without effect. Of `batches` those up to `CALIBRATION_TOKENS` are seen; for the same
    batches, threads and kernels the outcome has the same bits. The report of `model` says what is done in integers.

    Args:
        outliers: how many columns of every input keep their 16 bits.
        forward, backward: in which of the two passes there are integers.

    Raises InputError where no layer of the model can be multiplied so.
    """
    linears = _frozen_linears(model)
    peaks = ColumnPeaks()
    for linear in linears.values():
        attach(linear, peaks)
    try:
        _pass(model, batches)
    finally:
        for linear in linears.values():
            attach(linear, None)
    for bases, found in peaks.found.items():
        _recode(bases, _largest(found, outliers), model, forward, backward)
    reached = {id(base) for bases in peaks.found for base in bases}
    _tell(model, linears, reached)


def recode_unseen(model: FusedModel, is_filled: bool, outliers: int = OUTLIERS) -> None:
    """The same with columns that nobody measured, for what costs and takes room as a calibrated model does.

    Where the weights are not `is_filled` they are not read: the forms are arbitrary.
    """
    spread = {}
    for linear in _fused_linears(model):
        depth = linear.in_features
        if depth not in spread:
            count = min(outliers, depth)
            spread[depth] = torch.tensor([depth * i // count for i in range(count)], dtype=torch.int32)
        if is_filled:
            _recode((linear,), spread[depth], model, True, True)
        else:
            columns = torch.empty(linear.out_features, spread[depth].numel(), dtype=torch.bfloat16)
            attach(linear, Int8Form(torch.empty(linear.out_features), spread[depth], columns))


def _frozen_linears(model: FusedModel) -> dict[str, nn.Linear]:
    """All but the head."""
    head = original(model.graph.get_output_embeddings())
    return {
        name: module
        for name, module in model.graph.named_modules()
        if module is not head and _is_frozen_linear(module) and isinstance(module, nn.Linear)
    }


def _is_frozen_linear(module: nn.Module) -> bool:
    return isinstance(module, QuantisedLinear) or (type(module) is nn.Linear and not module.weight.requires_grad)


def _fused_linears(model: FusedModel) -> list[nn.Linear]:
    """Those that fused parts multiply with, as the structure says."""
    found: dict[int, nn.Linear] = {}
    for module in model.graph.modules():
        layers: list[nn.Module] = [module] if isinstance(module, FusedLoraLinear) else []
        if isinstance(module, FusedGatedMLP):
            layers += module.part().linears
        if isinstance(module.forward, FusedLayer):
            layers += module.forward.linears
        for layer in layers:
            base = layer.get_base_layer() if isinstance(layer, FusedLoraLinear) else layer
            if isinstance(base, nn.Linear) and _is_frozen_linear(base):
                found[id(base)] = base
    return list(found.values())


def _pass(model: FusedModel, batches: Iterable[Batch]) -> None:
    was_training = model.graph.training
    model.graph.eval()
    seen = 0
    try:
        with torch.no_grad():
            for batch in batches:
                if not batch.trained_tokens:
                    continue
                model.logprobs(batch)
                seen += batch.tokens.numel()
                if seen >= CALIBRATION_TOKENS:
                    break
    finally:
        model.graph.train(was_training)
    if not seen:
        raise ValueError("calibration without a batch of data")


def _largest(peaks: Tensor, count: int) -> Tensor:
    """Peaks [K] -> the columns of the largest, increasing, int32; of equal ones the first."""
    chosen = peaks.sort(descending=True, stable=True).indices[:count]
    return chosen.sort().values.to(torch.int32)


def _recode(bases: tuple[nn.Linear, ...], outliers: Tensor, model: FusedModel, forward: bool, backward: bool) -> None:
    bare = SharedProduct(bases, (1.0,) * len(bases), [None] * (2 * len(bases)), model.backend)
    codes = DYNAMIC_MAP.to(outliers.device)
    with torch.no_grad(), bare.held(model.dtype) as (frozen, offsets):
        for i, base in enumerate(bases):
            weight = (*frozen[4 * i : 4 * i + 3], offsets[i], base.out_features, base.in_features)
            scales = int8_products.int8_row_scales(*weight, codes, model.backend)
            columns = int8_products.int8_outlier_columns(*weight, outliers, codes, model.backend)
            attach(base, Int8Form(scales, outliers, columns, forward, backward))


def _tell(model: FusedModel, linears: dict[str, nn.Linear], reached: set[int]) -> None:
    """Into the report: how many layers are computed in integers, and why others are not."""
    others = Counter(_leaf(name) for name, linear in linears.items() if id(linear) not in reached)
    if not reached:
        raise InputError(
            f"no product of {type(model.graph).__name__} can be computed in int8: its layers go through parts that "
            "are not fused; take auto",
            where="train.compute",
        )
    model.report.replaced[PART] = len(reached)
    if others:
        which = ", ".join(f"{name} {count}" for name, count in sorted(others.items()))
        model.report.left[f"{PART} ({which})"] = "no fused part multiplies with them; in 16 bits"
    owned = {id(linear.stored) for linear in linears.values() if isinstance(linear, QuantisedLinear)}
    stacks = [m for m in model.graph.modules() if isinstance(m, QuantisedParameter) and id(m) not in owned]
    if stacks:
        model.report.left[f"{PART} (expert weights {len(stacks)})"] = "stacked, not linear layers; in 16 bits"


def _leaf(name: str) -> str:
    return name.removesuffix(".base_layer").rpartition(".")[2]
