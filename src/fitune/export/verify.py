"""The proof of a merge: the written checkpoint is loaded anew and its logits compared with base + adapter."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from fitune.adapters.outer_names import under_graph_names
from fitune.errors import FituneError
from fitune.export.adapter_delta import WEIGHTS
from fitune.export.trained_beside import TrainedBase
from fitune.models.build import build_dense
from fitune.models.conversion import GraphTensors
from fitune.models.folder import FolderSource
from fitune.models.graph import build_graph
from fitune.models.source import ModelSource

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "SELECT name, COUNT(*) FROM orders WHERE price > 12.5 GROUP BY name ORDER BY",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n",
    "机器学习是人工智能的一个分支,它研究如何让计算机从数据中",
)
MAX_PROMPT_TOKENS = 64

# Against PEFT's own merge, rounded to the source's dtype in the same way: only weights at the edge between
# two values may differ.
MERGE_TOLERANCE = 1e-3
# Against base + adapter unmerged, what the rounding costs is measured (PEFT's rounded merge against the same
# reference: 1.3 % for bfloat16, 30 layers); ours may cost half as much again. The floor is float32 noise.
ROUNDING_FACTOR = 1.5
ROUNDING_FLOOR = 1e-4
# A merge that costs more than this is wrong however it is rounded.
ROUNDING_CEILING = 0.1


@dataclass(frozen=True)
class Comparison:
    """Root-mean-square differences of logits, relative to the reference's deviation from its mean.

    Attributes:
        rounding_error, rounding_tolerance: merged against base + adapter through PEFT.
        merge_error, merge_tolerance: merged against PEFT's merge, rounded to the source's dtype.
        adapter_effect: base against base + adapter, on the same scale.
        tokens: positions compared.
        compute: the dtype both sides computed in.
    """

    rounding_error: float
    rounding_tolerance: float
    merge_error: float
    merge_tolerance: float
    adapter_effect: float
    tokens: int
    compute: str

    @property
    def is_equal(self) -> bool:
        return self.rounding_error <= self.rounding_tolerance and self.merge_error <= self.merge_tolerance


def compare_with_adapter(
    merged: Path, source: ModelSource, adapter: Path, keeps_tokenizer: bool = True
) -> Comparison:
    """Loads base, base + adapter and the merged folder one after the other and compares logits on `PROMPTS`.

    Computes in float32 where twice the model fits in memory so, in the source's dtype otherwise. Raises
    FituneError where the merged folder does not load whole (a tensor missing or misshapen), or its tokenizer
    is to be the base's (`keeps_tokenizer`) and gives other tokens.
    """
    prompts = _tokens(merged, source, keeps_tokenizer)
    names = [*source.tensor_names(), *source.carried_names()]
    parameters = sum(torch.Size(source.shape(name)).numel() for name in names)
    is_small = 2 * 4 * parameters < psutil.virtual_memory().available
    compute = torch.float32 if is_small else source.config.dtype
    base = _build_base(source, compute)
    plain = _logits(base, prompts)
    with under_graph_names(adapter, source.graph_module) as place:
        model = PeftModel.from_pretrained(base, str(place)).eval()
        _check_adapter(model, place / WEIGHTS)
    _put_weights_beside(model, source, adapter)
    reference = _logits(model, prompts)
    peft_merged = model.merge_and_unload()
    _round_weights(peft_merged, source)
    rounded = _logits(peft_merged, prompts)
    del base, model, peft_merged
    gc.collect()
    found = _logits(_load_merged(merged, compute), prompts)
    allowed = max(ROUNDING_FLOOR, min(ROUNDING_CEILING, ROUNDING_FACTOR * _relative(rounded, reference)))
    # In 16 bits PEFT multiplies B @ A in 16 bits too: its merge is then no finer a reference.
    merge_allowed = MERGE_TOLERANCE if compute == torch.float32 else allowed
    return Comparison(
        rounding_error=_relative(found, reference),
        rounding_tolerance=allowed,
        merge_error=_relative(found, rounded),
        merge_tolerance=merge_allowed,
        adapter_effect=_relative(plain, reference),
        tokens=sum(map(len, prompts)),
        compute=str(compute).removeprefix("torch."),
    )


@torch.no_grad()
def _put_weights_beside(model: PeftModel, source: ModelSource, adapter: Path) -> None:
    """Under the adapter, the weights that it was trained beside."""
    graph = build_graph(source.config, source.config.dtype)
    trained = TrainedBase(adapter, graph, GraphTensors(source, graph))
    if trained.is_own:
        return
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            own = module.get_base_layer().weight
            own.copy_(trained.weight(f"{name.removeprefix('base_model.model.')}.weight", own))


def _tokens(merged: Path, source: ModelSource, keeps_tokenizer: bool) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    rows = source.config.get_text_config().vocab_size
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    if keeps_tokenizer and prompts != [source.tokenizer()(text)["input_ids"] for text in PROMPTS]:
        raise FituneError("the written tokenizer gives other tokens than the base's when it is loaded anew")
    prompts = [prompt[:MAX_PROMPT_TOKENS] for prompt in prompts if prompt]
    if not prompts:
        raise FituneError("the tokenizer makes no tokens of ordinary text, so the merge cannot be compared")
    highest = max(max(prompt) for prompt in prompts)
    if highest >= rows:
        raise FituneError(f"the tokenizer gives token {highest}, the embeddings have only {rows} rows")
    return prompts


def _build_base(source: ModelSource, compute: torch.dtype) -> torch.nn.Module:
    """The base as transformers itself loads it, where its files are what transformers reads; else from `read`."""
    if isinstance(source, FolderSource) and source.is_plain:
        return AutoModelForCausalLM.from_pretrained(source.folder, dtype=compute, local_files_only=True).eval()
    # Trainable is to say: copies, which PEFT may merge into, not views of the file.
    model = build_dense(source, compute, trainable=True)
    return model.requires_grad_(False).eval()


def _load_merged(merged: Path, compute: torch.dtype) -> torch.nn.Module:
    """The written model in its own class; of a multimodal one all of it."""
    config = AutoConfig.from_pretrained(merged, local_files_only=True)
    kind: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model, report = kind.from_pretrained(merged, dtype=compute, local_files_only=True, output_loading_info=True)
    _check_loaded(report, "the merged model")
    return model.eval()


def _check_adapter(model: PeftModel, weights: Path) -> None:
    """PEFT only warns where it finds no place for a tensor."""
    with safe_open(weights, framework="pt") as file:
        written = set(file.keys())
    loaded = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if written != loaded:
        odd = sorted(written ^ loaded)
        raise FituneError(f"PEFT loads other tensors than {weights} holds, e.g. {odd[0]}: nothing to compare with")


def _check_loaded(report: dict[str, Any], what: str) -> None:
    problems = {key: report.get(key) for key in ("missing_keys", "mismatched_keys", "error_msgs") if report.get(key)}
    if problems:
        raise FituneError(f"{what} does not load whole: {problems}")


def _round_weights(model: torch.nn.Module, source: ModelSource) -> None:
    """Every parameter to its source's dtype and back, as the written file has it."""
    graph: PreTrainedModel = build_graph(source.config, source.config.dtype)
    dtypes = {
        name: dtype for group in GraphTensors(source, graph).groups for name, (_, dtype) in group.targets.items()
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.copy_(parameter.to(dtypes[name]))


@torch.no_grad()
def _logits(model: torch.nn.Module, prompts: list[list[int]]) -> list[torch.Tensor]:
    """One [T, V] float32 tensor a prompt."""
    return [model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float() for prompt in prompts]


def _relative(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    left, right = torch.cat(found), torch.cat(reference)
    scale = (right - right.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    error = ((left - right).square().mean().sqrt() / scale.clamp_min(1e-12)).item()
    return error if error == error else float("inf")
