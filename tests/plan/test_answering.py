"""Planned memory of answers on the way against what answering really holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_planned_bytes import config_of, run_of
from transformers import AutoModelForCausalLM

from fitune.generate import generate
from fitune.models.folder import FolderSource
from fitune.plan import answering
from fitune.plan.anatomy import read_anatomy
from fitune.plan.answering import Answering, answering_memory
from fitune.plan.computation import Computation
from fitune.plan.dry_run import Shape
from fitune.plan.live_bytes import LiveBytes
from fitune.plan.planner import run_memory
from fitune.quant.lease import lease_for_generation, leased
from fitune.train.prepare import build_for_training
from tiny_models import BACKEND


@pytest.mark.parametrize("resident_layers", [None, 2])
def test_what_exceeds_a_step_is_in_the_peak(resident_layers: int | None) -> None:
    """Weights and states stay while questions are answered; what a step holds beside them does not."""
    run, config, computation = run_of("qlora"), config_of("llama"), Computation(torch.bfloat16, BACKEND, 1, "a test")
    shape = Shape(2, 96, 48, 70)
    plain = run_memory(run, config, computation, shape)
    small, large = (
        run_memory(run, config, computation, shape, answering=Answering(rows, 0, 60, 40)) for rows in (1, 4096)
    )
    assert small.answering.bytes < plain.step.resident - plain.step.optimizer < large.answering.bytes
    assert small.bytes(resident_layers) == plain.bytes(resident_layers)
    weights = plain.bytes(resident_layers) - plain.at_peak(resident_layers)[1]
    assert large.bytes(resident_layers) == pytest.approx(
        weights + large.step.optimizer + large.answering.bytes, abs=plain.anatomy.head_bytes
    )


@pytest.mark.parametrize(
    ("model_type", "method", "asked"),
    [
        ("llama", "qlora", Answering(8, 0, 60, 40)),
        ("llama", "lora", Answering(16, 90, 12, 30)),
        ("gpt2", "full", Answering(8, 20, 60, 20)),
        ("mixtral", "qlora", Answering(8, 0, 60, 20)),
    ],
)
def test_planned_bytes_are_the_real_ones(
    model_type: str, method: str, asked: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never less than what is alive at one time, and not much more: what is planned is all rows full."""
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    run, config, dtype = run_of(method), config_of(model_type), torch.bfloat16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).save_pretrained(tmp_path / "model")
    model = build_for_training(run, FolderSource(tmp_path / "model"), Computation(dtype, BACKEND, 1, "a test"))
    model.graph.eval()
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(700, 1400, (asked.shared_tokens,), generator=generator).tolist()
    rest = [[500 + n, *([600 + n] * (asked.own_tokens - 1))] for n in range(asked.rows + 4)]
    prompts = [start + own for own in rest]

    def answer() -> None:
        with leased(model.graph, lease_for_generation(model.backend, model.dtype)):
            generate(
                model.graph, prompts, max_new_tokens=asked.new_tokens, eos_ids=[], pad_id=0, batch_size=asked.rows
            )

    answer()  # the way of generating is proven once
    with LiveBytes() as live:
        answer()
    planned, more = (
        answering_memory(run, config, read_anatomy(run, config, dtype), one, dtype, BACKEND)
        for one in (asked, replace(asked, new_tokens=400))
    )
    assert planned.guessed is more.guessed is None
    assert live.peak <= planned.bytes <= 1.6 * live.peak
    assert more.bytes > 1.5 * planned.bytes


def test_an_estimate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model cannot be dry-run; and it is no less than what a dry run finds."""
    run, config = run_of("qlora"), config_of("llama")
    arguments = (run, config, read_anatomy(run, config, torch.bfloat16), Answering(8, 0, 60, 40))
    counted = answering_memory(*arguments, torch.bfloat16, BACKEND)

    def refuse(*_: object) -> int:
        raise NotImplementedError("an operator without a fake\nand more")

    monkeypatch.setattr(answering, "_known", {})
    monkeypatch.setattr(answering, "_dry_run", refuse)
    guessed = answering_memory(*arguments, torch.bfloat16, BACKEND)
    assert guessed.guessed == "NotImplementedError: an operator without a fake"
    assert guessed.bytes >= counted.bytes
