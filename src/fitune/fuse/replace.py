"""Replacing a model's parts by fused ones, each accepted by proof, and the report of what was done and why not.

Order of things: build, inject adapters, then this. Fused modules keep the children and parameters of what they
replace under the same names.
"""

from __future__ import annotations

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
from fitune.fuse.prove import prove

PROOF_TOKENS = 24
# Through all layers, in the dtype of the computation: rounding in bfloat16 adds up, a wrong mask shows at 0.1.
ATTENTION_TOLERANCE = 5e-2


@dataclass
class FusionReport:
    """What was replaced (part -> how many) and what was left (part -> reason)."""

    replaced: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)


def fuse(model: PreTrainedModel, dtype: torch.dtype, backend: str, proofs: bool) -> FusionReport:
    """Replaces what it can of `model` (the transformers model, adapters injected) in place.

    `proofs=False` accepts every part by structure alone, for dry runs: what a part costs does not depend on which
    of its candidates is right.
    """
    report = FusionReport()
    report.replaced["linear"] = sum(isinstance(module, FusedLoraLinear) for module in model.modules())
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    _replace(decoder, "norm", lambda m: fused_norm_candidates(m, backend), _norm_width, dtype, report, proofs)
    _replace(decoder, "mlp", lambda m: fused_mlp_candidates(m, backend), _mlp_width, dtype, report, proofs)
    _replace_attention(model, backend, report, proofs)
    return report


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
        signature = _signature(module)
        if signature not in proven:
            proven[signature] = None if proofs else 0
            reasons: list[str] = []
            with _TrainedAdapter(module):
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


class _TrainedAdapter:
    """For the length of a proof, gives every LoRA B of `module` values: at zero they would prove nothing."""

    def __init__(self, module: nn.Module) -> None:
        self._factors = [
            parameter for name, parameter in module.named_parameters() if "lora_B" in name and parameter.dim() == 2
        ]

    def __enter__(self) -> None:
        self._saved = [parameter.detach().clone() for parameter in self._factors]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self._factors:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():
            for parameter, saved in zip(self._factors, self._saved, strict=True):
                parameter.copy_(saved)


def _replace_attention(model: PreTrainedModel, backend: str, report: FusionReport, proofs: bool) -> None:
    reason = attention.obstacle(model)
    if reason is not None:
        report.left["attention"] = reason
        return
    attention.register()
    before = model.config._attn_implementation
    expected = _hidden(model, None) if proofs else None
    model.set_attn_implementation(attention.NAMES[backend])
    if expected is not None:
        documents = torch.tensor([[0, 0, PROOF_TOKENS, 0, 0]], dtype=torch.int32)
        try:
            distance = float((_hidden(model, documents) - expected).norm() / expected.norm().clamp(min=1e-30))
            reason = None if distance <= ATTENTION_TOLERANCE else f"the model's output differs by {distance:.1e}"
        except (FituneError, RuntimeError, TypeError, ValueError) as error:
            reason = f"cannot be compared: {error}"
        if reason is not None:
            model.set_attn_implementation(before)
            report.left["attention"] = reason
            return
    report.replaced["attention"] = int(getattr(model.config, "num_hidden_layers", 1))


def _hidden(model: PreTrainedModel, documents: torch.Tensor | None) -> torch.Tensor:
    """Last hidden states [T, C] of one random sequence, float32; by documents, or as the model does it itself."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.get_input_embeddings().weight.shape[0], (1, PROOF_TOKENS), generator=generator)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if documents is None:
                out = model.get_decoder()(input_ids=tokens, use_cache=False)
            else:
                with attention.documents_given():
                    out = model.get_decoder()(input_ids=tokens, use_cache=False, documents=documents)
    finally:
        model.train(was_training)
    hidden: torch.Tensor = out.last_hidden_state[0].float()
    return hidden
