"""The audit of one model type: a tiny random model of it, taken through everything a run does, against transformers.

Reference: transformers' own model with PEFT's own LoRA layers, in float32.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fitune.adapters.lora import inject, load_adapter, save_adapter
from fitune.audit.tiny_configs import AUDIT_TOKENS, NOT_AUDITED, tiny_config
from fitune.data.batch import Batch
from fitune.data.collation import collate
from fitune.data.encoding import EncodedSample
from fitune.errors import FituneError
from fitune.fuse.adapter_layers import fused_lora_layer
from fitune.fuse.model import FusedModel, prepare
from fitune.generate import generate
from fitune.models.build import build_dense, build_quantised
from fitune.models.folder import FolderSource
from fitune.models.graph import LEAST_QUANTISED_SHARE, build_graph, head_name, quantised_names, quantised_share
from fitune.models.source import ModelSource
from fitune.quant.linear import QuantisedLinear
from fitune.quant.parameter import QuantisedParameter
from fitune.step.update import update

ROWS = 2
RANK = 4
# float32 against float32, relative: orders of summation differ, formulas do not.
TOLERANCE = 1e-4
# In bfloat16 ours may be so many times as far from float32 as transformers' own.
BFLOAT16_FACTOR = 2.0
BFLOAT16_BATCHES = 7
MORE_BFLOAT16_BATCHES = 31  # taken where the first ones do not pass
NEW_TOKENS = 8
# A gradient smaller than this share of all gradients together is compared on the scale of that share.
SMALL_GRADIENT = 1e-3


@dataclass
class AuditRow:
    """What the audit found for one model type.

    Attributes:
        passed: every check that applies holds.
        replaced: fused part -> how many; left: part -> why it was not fused.
        packs: several documents may share a row.
        quantised_share: of the weights outside embeddings and head, at the type's default sizes.
        errors: what was compared -> relative difference.
        failures: checks that do not hold, with what was found.
        notes: what could not be checked, and why.
        reason: why the type is not audited, or could not be.
    """

    model_type: str
    architecture: str = ""
    passed: bool = False
    replaced: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    packs: bool = False
    quantised_share: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def audit_model(model_type: str, backend: str) -> AuditRow:
    """Builds a tiny random model of `model_type` and checks everything; never raises for what the model does."""
    row = AuditRow(model_type)
    if model_type in NOT_AUDITED:
        row.reason = NOT_AUDITED[model_type]
        return row
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fitune-audit-") as place:
        try:
            _Audit(row, tiny_config(model_type), Path(place), backend).run()
        except Exception as error:  # whatever a model stumbles over is a finding
            row.reason = f"{type(error).__name__}: {_first_line(error)}".replace(place, "the tiny model")
    row.passed = row.reason is None and not row.failures
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


class _Audit:
    """One model type's checks, in order; each writes into the row."""

    def __init__(self, row: AuditRow, config: PretrainedConfig, place: Path, backend: str) -> None:
        self.row, self.config, self.place, self.backend = row, config, place, backend
        self.source: ModelSource = _write_model(config, place / "model")
        self.batch = _batch(config)

    def run(self) -> None:
        exact = self._reference(torch.float32)
        ours = self._ours(torch.float32)
        self.row.architecture = type(ours.graph).__name__
        self.row.replaced, self.row.left = dict(ours.report.replaced), dict(ours.report.left)
        self.row.packs = ours.report.packs
        _copy_adapter(ours.graph, exact)
        expected = _reference_pass(exact, self.batch)
        found = _our_pass(ours, self.batch)
        self._hold("logits", found[0], expected[0])
        self._hold_gradients("gradients", found[1], expected[1])
        self._check("bfloat16", lambda: self._bfloat16(ours, exact, expected))
        self._check("packing", lambda: self._packing(ours))
        self._check("adapter", lambda: self._adapter(ours, exact))
        self._check("generation", lambda: self._generation(ours, exact))
        self._check("quantised", lambda: self._quantised(ours, exact))
        self._check("share", self._share)

    def _check(self, name: str, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as error:
            self.row.failures.append(f"{name}: {type(error).__name__}: {_first_line(error)}")

    def _reference(self, dtype: torch.dtype) -> PeftModel:
        base = self._their_base(dtype)
        names = [name for name, module in self._fresh().named_modules() if hasattr(module, "lora_A")]
        peft = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, bias="none"))
        return peft.eval()

    def _their_base(self, dtype: torch.dtype) -> PreTrainedModel:
        """transformers' own model; its plain attention, because the faster ones leave soft caps out."""
        model = AutoModelForCausalLM.from_pretrained(self.place / "model", dtype=dtype, local_files_only=True)
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")
        return model

    def _fresh(self) -> PreTrainedModel:
        """Our graph with adapters, without weights: which layers are adapted."""
        graph = build_graph(self.config, torch.float32)
        _inject(graph, fused=False)
        return graph

    def _ours(self, dtype: torch.dtype) -> FusedModel:
        graph = build_dense(self.source, dtype, trainable=False)
        peft = _inject(graph, fused=True)
        _randomise_b(peft)
        graph.eval()
        return prepare(graph, peft, dtype, self.backend)

    def _hold(self, name: str, found: Tensor, expected: Tensor) -> None:
        error = _distance(found, expected)
        self.row.errors[name] = error
        if not error <= TOLERANCE:
            self.row.failures.append(f"{name} differ by {error:.1e}")

    def _hold_gradients(self, name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        whole = float(torch.cat([value.flatten() for value in expected.values()]).norm())
        worst, worst_name = 0.0, ""
        for key in sorted({*found, *expected}):
            zero = torch.zeros(())
            one, other = found.get(key, zero), expected.get(key, zero)
            scale = max(float(other.norm()), SMALL_GRADIENT * whole, 1e-30)
            error = float((one - other).norm()) / scale
            if not error <= worst:
                worst, worst_name = error, key
        self.row.errors[name] = worst
        if not worst <= TOLERANCE:
            self.row.failures.append(f"{name} of {worst_name} differ by {worst:.1e}")

    def _bfloat16(
        self, exact_ours: FusedModel, exact: PeftModel, expected: tuple[Tensor, dict[str, Tensor]]
    ) -> None:  # fmt: skip
        theirs = self._reference(torch.bfloat16)
        _copy_adapter(exact_ours.graph, theirs)
        try:
            _reference_pass(theirs, self.batch)
        except RuntimeError as error:
            self.row.notes.append(f"transformers itself does not compute it in bfloat16: {_first_line(error)}")
            return
        ours = self._ours(torch.bfloat16)
        # An expert chosen otherwise by one rounding weighs more than all other roundings: the median of some batches.
        ratios: dict[str, list[float]] = {"bfloat16 logits": [], "bfloat16 gradients": []}
        for seed in range(MORE_BFLOAT16_BATCHES):
            if seed == BFLOAT16_BATCHES and all(
                statistics.median(found) <= BFLOAT16_FACTOR for found in ratios.values()
            ):
                break
            batch = _batch(self.config, ROWS * seed)
            truth = expected if seed == 0 else _reference_pass(exact, batch)
            other, mine = _reference_pass(theirs, batch), _our_pass(ours, batch)
            ratios["bfloat16 logits"].append(_ratio(mine[0], other[0], truth[0]))
            ratios["bfloat16 gradients"].append(_ratio(*(_flat(gradients) for _, gradients in (mine, other, truth))))
        for name, found in ratios.items():
            ratio = statistics.median(found)
            self.row.errors[name] = ratio
            if not ratio <= BFLOAT16_FACTOR:
                self.row.failures.append(f"{name} {ratio:.1f} times as far from float32 as transformers' own")

    def _packing(self, ours: FusedModel) -> None:
        if not ours.report.packs:
            return
        cut = AUDIT_TOKENS // 2 - 3
        samples = [_sample(self.config, seed, count) for seed, count in ((7, cut), (8, AUDIT_TOKENS - cut))]
        row = collate([samples], AUDIT_TOKENS, 0)
        alone = [collate([[sample]], len(sample), 0) for sample in samples]
        packed = _our_pass(ours, row)
        factors = _factors(row).split([one.trained_tokens for one in alone])
        apart = [_our_pass(ours, one, part) for one, part in zip(alone, factors, strict=True)]
        self._hold("packed logits", packed[0], torch.cat([logits for logits, _ in apart]))
        summed = {name: sum(one[name] for _, one in apart) for name in packed[1]}
        self._hold_gradients("packed gradients", packed[1], summed)

    def _adapter(self, ours: FusedModel, exact: PeftModel) -> None:
        assert ours.adapted is not None
        folder = self.place / "adapter"
        save_adapter(ours.adapted, folder, {"reference": "tiny", "identity": self.source.identity()})
        expected = _logits(ours.graph, self.batch)
        exact.save_pretrained(self.place / "theirs")
        again = PeftModel.from_pretrained(self._their_base(torch.float32), str(self.place / "theirs")).eval()
        if _distance(_logits(again, self.batch), expected) > TOLERANCE:
            self.row.notes.append("PEFT itself does not load what it saved of this model")
        else:
            loaded = PeftModel.from_pretrained(self._their_base(torch.float32), str(folder)).eval()
            self._hold("adapter in PEFT", _logits(loaded, self.batch), expected)
        graph = build_dense(self.source, torch.float32, trainable=False)
        load_adapter(graph, self.place / "theirs", self.source.identity(), fused_lora_layer)
        self._hold("adapter from PEFT", _logits(graph.eval(), self.batch), expected)

    def _generation(self, ours: FusedModel, exact: PeftModel) -> None:
        prompts = [self.batch.tokens[0, :9].tolist(), self.batch.tokens[1, :13].tolist()]
        pad = getattr(self.config.get_text_config(), "pad_token_id", None)
        found = generate(ours.graph, prompts, max_new_tokens=NEW_TOKENS, eos_ids=[], pad_id=0)
        for prompt, answer in zip(prompts, found, strict=True):
            tokens = list(prompt)
            with torch.no_grad():
                for _ in range(NEW_TOKENS):
                    logits = exact(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
                    tokens.append(int(logits.argmax()))
            expected = tokens[len(prompt) :]
            if pad in expected:  # what a model makes of padding inside a text is its own affair
                expected, answer = (each[: expected.index(pad)] for each in (expected, answer))
            if answer != expected:
                self.row.failures.append("generation: with a cache other tokens than without")
                return

    def _quantised(self, dense: FusedModel, exact: PeftModel) -> None:
        with _private_cache(self.place / "cache"):
            graph = build_quantised(self.source, torch.float32, self.backend, least_share=0.0)
        decoded = _decoded_weights(graph)
        peft = _inject(graph, fused=True)
        _copy_adapter(dense.graph, peft)
        graph.eval()
        ours = prepare(graph, peft, torch.float32, self.backend)
        base = exact.get_base_model()
        parameters = dict(base.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in decoded.items():
                owner, _, leaf = name.rpartition(".")
                key = name if name in parameters else f"{owner}.base_layer.{leaf}"
                parameters[key].copy_(value)
        expected, found = _reference_pass(exact, self.batch), _our_pass(ours, self.batch)
        self._hold("quantised logits", found[0], expected[0])
        self._hold_gradients("quantised gradients", found[1], expected[1])
        graph.train()
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(ours.trainable, lr=1e-3)
        before = [parameter.detach().clone() for parameter in ours.trainable]
        update(ours, [self.batch], optimizer, 1e-3, 1.0)
        if all(torch.equal(one, other) for one, other in zip(before, ours.trainable, strict=True)):
            self.row.failures.append("quantised: a step changed nothing")

    def _share(self) -> None:
        try:
            graph = build_graph(type(self.config)(), torch.bfloat16)
        except Exception as error:  # some defaults are no model
            self.row.notes.append(f"its default configuration cannot be built: {_first_line(error)}")
            graph = build_graph(self.config, torch.bfloat16)
        share = quantised_share(graph, quantised_names(graph))
        self.row.quantised_share = round(share, 4)
        if share < LEAST_QUANTISED_SHARE:
            self.row.failures.append(f"share: only {share:.0%} of the weights are quantised")


def _ratio(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> float:
    """Our distance from the truth in theirs."""
    return _distance(ours, truth) / max(_distance(theirs, truth), 1e-30)


def _write_model(config: PretrainedConfig, folder: Path) -> FolderSource:
    """A model with random weights, none of them constant, saved in bfloat16 as transformers saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Matrices so large that no branch is dead; scores and logits that reach the bend of a soft cap.
            bends = (head is not None and parameter is head.weight) or re.search(r"\b(q|k|qkv|query|key)_", name)
            # What steers a linear attention's recurrence: at full size it amplifies rounding past the gate.
            if re.search(r"\bin_proj_(qkv|z|ba?|a)", name):
                size = 0.3 if re.search(r"\bin_proj_(qkv|z)", name) else 0.1
            else:
                size = 1.8 if bends else 1.0
            scale = 0.1 if parameter.dim() < 2 else size * parameter.shape[-1] ** -0.5
            parameter.add_(scale * noise)
    model.to(torch.bfloat16).save_pretrained(folder)
    return FolderSource(folder)


def _inject(graph: PreTrainedModel, fused: bool) -> PeftModel:
    return inject(
        graph, head_name(graph), rank=RANK, alpha=2.0 * RANK, dropout=0.0, targets="all-linear", rslora=False, seed=1,
        base_name="tiny", layer=fused_lora_layer if fused else None,
    )  # fmt: skip


def _randomise_b(peft: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _lora_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """By the names inside the transformers model."""
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters() if ".lora_" in name
    }  # fmt: skip


def _copy_adapter(origin: torch.nn.Module, target: torch.nn.Module) -> None:
    values = _lora_parameters(origin)
    with torch.no_grad():
        for name, parameter in _lora_parameters(target).items():
            parameter.copy_(values[name])


def _sample(config: PretrainedConfig, seed: int, count: int = AUDIT_TOKENS) -> EncodedSample:
    generator = torch.Generator().manual_seed(seed)
    rows = config.get_text_config().vocab_size
    # Special tokens lie at the ends of the vocabulary; some models treat them apart.
    tokens = torch.randint(rows // 4, rows // 2, (count,), generator=generator).tolist()
    return EncodedSample(tuple(tokens), tuple(place > 2 for place in range(count)), None)


def _batch(config: PretrainedConfig, first_seed: int = 0) -> Batch:
    return collate([[_sample(config, first_seed + row)] for row in range(ROWS)], AUDIT_TOKENS, 0)


def _factors(batch: Batch) -> Tensor:
    """What each trained token's log-probability counts: random, so that no mistake cancels out."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch.trained_tokens, generator=generator)


def _reference_pass(peft: PeftModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of the trained tokens, and every LoRA gradient of their weighted sum."""
    logits = peft(input_ids=batch.tokens, use_cache=False).logits.float()
    chosen = batch.weights[:, 1:] > 0
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[..., 0][chosen]
    return _finish(peft, logprobs, _factors(batch))


def _our_pass(
    model: FusedModel, batch: Batch, factors: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    logprobs, _ = model.logprobs(batch)
    return _finish(model.graph, logprobs, _factors(batch) if factors is None else factors)


def _finish(model: torch.nn.Module, logprobs: Tensor, factors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    (logprobs * factors).sum().backward()
    gradients = {}
    for name, parameter in _lora_parameters(model).items():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.float().clone()
            parameter.grad = None
    values = logprobs.detach()
    if not bool(torch.isfinite(values).all()):
        raise FituneError("log-probabilities are not finite")
    return values, gradients


def _logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=batch.tokens, use_cache=False).logits.float()
    return logits


def _decoded_weights(graph: PreTrainedModel) -> dict[str, Tensor]:
    """Every quantised parameter of the graph, decoded."""
    found = {}
    for name, module in graph.named_modules():
        if isinstance(module, QuantisedParameter):
            found[name] = module.dense()
        elif isinstance(module, QuantisedLinear):
            found[f"{name}.weight"] = module.nf4().dense(torch.float32, module.backend)
    return found


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@contextmanager
def _private_cache(folder: Path) -> Iterator[None]:
    """Inside, stores are made in `folder`."""
    import os

    before = os.environ.get("FITUNE_CACHE")
    os.environ["FITUNE_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["FITUNE_CACHE"]
        else:
            os.environ["FITUNE_CACHE"] = before
