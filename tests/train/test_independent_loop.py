"""Fifty steps of the real model beside a loop of transformers, PEFT and torch that shares no code with ours."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fitune.config import load
from fitune.models.bundled import bundled_file
from fitune.train.run import plan_run, prepare_run, train_run
from fitune.train.run_folder import RunFolder

STEPS, WARMUP, MICRO_BATCH, ACCUMULATION = 50, 5, 2, 2
RATE, DECAY, LIMIT = 1e-3, 0.01, 0.5
DOCS = Path(__file__).parents[2] / "docs"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def their_model(in_four_bits: bool = False) -> Any:
    """The bundled weights as transformers reads them, in the 16 bits that ours have; or as bitsandbytes makes NF4."""
    path = bundled_file()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    if in_four_bits:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                packed, state = quantize_4bit(module.weight.data, compress_statistics=True, quant_type="nf4")
                module.weight.data = dequantize_4bit(packed, state).float()
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of unequal length, and an adapter that PEFT made, whose B is not zero."""
    folder = tmp_path_factory.mktemp("fifty")
    parts = [part for path in sorted(DOCS.glob("*.md")) for part in path.read_text().split("\n\n")]
    texts = [part for part in parts if 60 <= len(part) <= 240][: STEPS * MICRO_BATCH * ACCUMULATION]
    assert len(texts) == STEPS * MICRO_BATCH * ACCUMULATION
    lines = [json.dumps({"instruction": text[: len(text) // 3], "output": text[len(text) // 3 :]}) for text in texts]
    (folder / "train.jsonl").write_text("\n".join(lines))
    torch.manual_seed(7)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(their_model(), settings)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_B" in name:
                value.normal_(0.0, 0.002)
    peft.save_pretrained(folder / "adapter")
    return folder


def ours(place: Path, method: str, compute: str) -> tuple[list[tuple[float, float]], list[list[list[Any]]]]:
    """(loss, gradient norm) of every step, and the samples of its micro-batches."""
    run_file, folder = place / "run.yaml", place / f"{method}-{compute}"
    settings = {
        "model": "bundled", "method": method, "data": {"train": str(place / "train.jsonl"), "pack": False},
        "lora": {"start_from": str(place / "adapter")},
        "train": {
            "steps": STEPS, "warmup_steps": WARMUP, "micro_batch": MICRO_BATCH, "accumulation": ACCUMULATION,
            "learning_rate": RATE, "schedule": "cosine", "weight_decay": DECAY, "max_grad_norm": LIMIT,
            "compute": compute,
        },
    }  # fmt: skip
    run_file.write_text(json.dumps(settings))
    prepared = prepare_run(load(run_file))
    rows = prepared.rows
    steps = [
        [[rows.samples[n] for row in taken[at : at + MICRO_BATCH] for n in row.samples]
         for at in range(0, len(taken), MICRO_BATCH)]
        for _, taken in rows.steps(1.0, STEPS)
    ]  # fmt: skip
    outcome = train_run(prepared, plan_run(prepared, with_time=False), RunFolder(folder))
    return [(record.loss, record.grad_norm) for record in outcome.records], steps


def theirs(place: Path, steps: list[list[list[Any]]], in_four_bits: bool) -> list[tuple[float, float]]:
    """The same with padded batches, labels of -100, torch's AdamW, clipping and a cosine written out."""
    model = PeftModel.from_pretrained(their_model(in_four_bits), str(place / "adapter"), is_trainable=True)
    weights = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    found = []
    for number, batches in enumerate(steps):
        total = sum(sum(sample.trained) for batch in batches for sample in batch)
        loss_of_step = 0.0
        for batch in batches:
            longest = max(len(sample.tokens) for sample in batch)
            tokens = torch.zeros(len(batch), longest, dtype=torch.long)
            mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
            for row, sample in enumerate(batch):
                size = len(sample.tokens)
                tokens[row, :size], mask[row, :size] = torch.tensor(sample.tokens), 1
                trained = torch.tensor(sample.trained)
                labels[row, :size] = torch.where(trained, tokens[row, :size], -100)
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / total).backward()
            loss_of_step += float(loss.detach()) / total
        norm = float(torch.nn.utils.clip_grad_norm_(weights, LIMIT))
        if number < WARMUP:
            share = (number + 1) / (WARMUP + 1)
        else:
            share = 0.5 * (1 + math.cos(math.pi * (number - WARMUP) / (STEPS - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss_of_step, norm))
    return found


def distances(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Of every step how far the loss and the gradient norm are apart, as shares of the other's."""
    losses = [abs(a / b - 1) for (a, _), (b, _) in zip(one, other, strict=True)]
    norms = [abs(a / b - 1) for (_, a), (_, b) in zip(one, other, strict=True)]
    print(
        f"loss {statistics.mean(losses):.1e}, at most {max(losses):.1e}; norm {statistics.mean(norms):.1e}, at most "
        f"{max(norms):.1e}"
    )
    return losses, norms


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fifty_steps_are_those_of_an_independent_loop(place: Path, method: str) -> None:
    found, steps = ours(place, method, "float32")
    expected = theirs(place, steps, method == "qlora")
    assert len(found) == len(expected) == STEPS
    assert expected[-1][0] < expected[0][0] - 0.5
    losses, norms = distances(found, expected)
    assert max(losses) < 1e-5
    assert max(norms) < 1e-4
    if method == "qlora":
        losses, norms = distances(ours(place, method, "bfloat16")[0], expected)
        assert statistics.mean(losses) < 3e-3
        assert statistics.mean(norms) < 1e-2
