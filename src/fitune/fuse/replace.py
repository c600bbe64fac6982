"""Replacing a model's parts by fused ones, each accepted by proof, and the report of what was done and why not.

Order of things: build, inject adapters, then this. Fused modules keep the children and parameters of what they
replace under the same names.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from fitune.errors import FituneError
from fitune.fuse import attention
from fitune.fuse.gated_mlp import fused_mlp_candidates
from fitune.fuse.lora_linear import FusedLoraLinear
from fitune.fuse.norm import fused_norm_candidates
from fitune.fuse.prove import TOLERANCE, prove, with_trained_adapter
from fitune.fuse.replace_layers import LayerCalls, layer_calls, replace_layers, undo_layers
from fitune.models.dropout import drops

# Two documents in a row, each longer than the windows and chunks of tiny models are.
PROOF_TOKENS = (24, 17)
# Through all layers, in the dtype of the computation: rounding in bfloat16 adds up, a wrong mask shows at 0.1.
WHOLE_MODEL_TOLERANCE = 5e-2


@dataclass
class FusionReport:
    """What was replaced (part -> how many) and what was left (part -> reason).

    Attributes:
        packs: whether several documents may share a row: each is then computed as if it were alone.
        takes_positions: whether the model counts positions from 0 and may be told them; otherwise it counts by
            itself, which it can for rows of one document only.
    """

    replaced: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)
    takes_positions: bool = True

    @property
    def packs(self) -> bool:
        return "attention" in self.replaced


def fuse(model: PreTrainedModel, dtype: torch.dtype, backend: str, proofs: bool) -> FusionReport:
    """Replaces what it can of `model` (the transformers model, adapters injected) in place.

    `proofs=False` accepts every part by structure alone, for dry runs: what a part costs does not depend on which
    of its candidates is right.
    """
    report = FusionReport()
    report.replaced["linear"] = sum(isinstance(module, FusedLoraLinear) for module in model.modules())
    _replace(model, "norm", lambda m: fused_norm_candidates(m, backend), _norm_width, dtype, report, proofs)
    _replace(model, "mlp", lambda m: fused_mlp_candidates(m, backend), _mlp_width, dtype, report, proofs)
    first = _counted_logits(model) if proofs else None
    report.takes_positions = first is not None or not proofs
    packed, calls = _replace_attention(model, backend, report, first)
    if "attention" not in report.replaced:
        report.left["layer"] = "its attention does not go by documents"
        return report
    _replace_layers(model, dtype, backend, report, packed, calls)
    return report


def _counted_logits(model: PreTrainedModel) -> torch.Tensor | None:
    """The first document's logits; None where positions 0, 1, 2 ... are not what the model counts by itself.

    RoBERTa's begin at 2; some models take none.
    """
    tokens = _two_documents(model)[0]
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    by_itself = _logits(model, tokens)
    told = _logits(model, tokens, position_ids=torch.arange(tokens.shape[1]).unsqueeze(0))
    return by_itself if _distance(told, by_itself) <= TOLERANCE else None


def _norm_width(module: nn.Module) -> int:
    return int(module.weight.shape[0])


def _mlp_width(module: nn.Module) -> int:
    return int(module.gate_proj.in_features)


def _signature(module: nn.Module) -> tuple[object, ...]:
    """What two modules must share for the proof of one to cover the other: everything but their weights' values."""
    attributes = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, (int, float, str, bool, type(None)))
    }
    activation = getattr(module, "act_fn", None)
    shapes = [(name, tuple(p.shape), p.dtype) for name, p in module.named_parameters()]
    kinds = [(name, type(child).__name__) for name, child in module.named_modules()]
    return (
        type(module), tuple(sorted((k, repr(v)) for k, v in attributes.items())), repr(activation), tuple(shapes),
        tuple(kinds),
    )  # fmt: skip


def _replace(
    root: nn.Module, part: str, candidates: Callable[[nn.Module], Sequence[nn.Module]],
    width: Callable[[nn.Module], int], dtype: torch.dtype, report: FusionReport, proofs: bool,
) -> None:  # fmt: skip
    proven: dict[tuple[object, ...], int | None] = {}
    for name, module in list(root.named_modules()):
        options = candidates(module)
        if not options:
            continue
        if drops(module):
            report.left[f"{part} ({type(module).__name__})"] = "it has dropout"
            continue
        signature = _signature(module)
        if signature not in proven:
            proven[signature] = None if proofs else 0
            reasons: list[str] = []
            with with_trained_adapter(module):
                for number, option in enumerate(options if proofs else ()):
                    verdict = prove(module, option, width(module), dtype)
                    reasons.append(verdict.reason)
                    if verdict.holds:
                        proven[signature] = number
                        break
            if proven[signature] is None:
                report.left[f"{part} ({type(module).__name__})"] = "; ".join(dict.fromkeys(reasons))
        chosen = proven[signature]
        if chosen is None:
            continue
        parent, _, leaf = name.rpartition(".")
        fused = options[chosen]
        fused.train(module.training)
        setattr(root.get_submodule(parent), leaf, fused)
        report.replaced[part] += 1


def _replace_attention(
    model: PreTrainedModel, backend: str, report: FusionReport, first: torch.Tensor | None
) -> tuple[torch.Tensor | None, LayerCalls | None]:
    """Attention by documents, accepted where each of two documents in a row computes what it computes alone.

    `first`: the logits of the first one alone; None: it is accepted by structure alone.
    Returns the logits [T, V] of both in one row, and what that pass asked of the layers; None and None without
    proofs, and where it is not accepted.
    """
    reason = attention.obstacle(model)
    if reason is None and not report.takes_positions:
        reason = "positions cannot be given to the model"
    if reason is not None:
        report.left["attention"] = reason
        return None, None
    attention.register()
    before = model.config._attn_implementation
    apart = None if first is None else [first, _logits(model, _two_documents(model)[1])]
    model.set_attn_implementation(attention.NAMES[backend])
    packed: torch.Tensor | None = None
    calls: LayerCalls | None = None
    if apart is not None:
        try:
            with layer_calls(model) as calls:
                packed = _packed_logits(model)
            distance = max(
                _model_distance(model, found, expected)
                for found, expected in zip(packed.split([len(one) for one in apart]), apart, strict=True)
            )
            reason = None if distance <= WHOLE_MODEL_TOLERANCE else f"the model's output differs by {distance:.1e}"
        except (FituneError, RuntimeError, TypeError, ValueError) as error:
            reason = f"cannot be compared: {error}"
        if reason is not None:
            model.set_attn_implementation(before)
            report.left["attention"] = reason
            return None, None
    report.replaced["attention"] = int(getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    return packed, calls


def _replace_layers(
    model: PreTrainedModel, dtype: torch.dtype, backend: str, report: FusionReport, packed: torch.Tensor | None,
    calls: LayerCalls | None,
) -> None:  # fmt: skip
    """Whole layers; given the logits without them, none where the model as a whole is another one with them.

    Layers alike in all that can be compared are proven once; this sees one that is different all the same.
    """
    count, left = replace_layers(model, dtype, backend, calls)
    if count and packed is not None:
        distance = _model_distance(model, _packed_logits(model), packed)
        if not distance <= WHOLE_MODEL_TOLERANCE:
            undo_layers(model)
            count, left = 0, left | {"all": f"with them the model's output differs by {distance:.1e}"}
    if count:
        report.replaced["layer"] = count
    report.left |= {f"layer ({kind})": reason for kind, reason in left.items()}


def _model_distance(model: PreTrainedModel, found: torch.Tensor, expected: torch.Tensor) -> float:
    return (_usual_distance if _routes(model) else _distance)(found, expected)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _usual_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over tokens [T, V]: what a document leaks or a window loses touches most of them."""
    apart = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return float(apart.median())


def _routes(model: PreTrainedModel) -> bool:
    """Whether the model chooses experts: on a rounding it chooses others, and the token's numbers are new ones."""
    return any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())


def _two_documents(model: PreTrainedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0]
    return [torch.randint(rows, (1, count), generator=generator) for count in PROOF_TOKENS]


def _packed_logits(model: PreTrainedModel) -> torch.Tensor:
    """Both documents in one row."""
    first, second = _two_documents(model)
    middle, end = first.shape[1], first.shape[1] + second.shape[1]
    documents = torch.tensor([[0, 0, middle, 0, 0], [0, middle, end, 0, 0]], dtype=torch.int32)
    positions = torch.cat([torch.arange(middle), torch.arange(end - middle)]).unsqueeze(0)
    with attention.documents_given():
        return _logits(model, torch.cat([first, second], 1), position_ids=positions, documents=documents)


def _logits(model: PreTrainedModel, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one row, float32."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False, **inputs).logits[0].float()
    finally:
        model.train(was_training)
    return logits
