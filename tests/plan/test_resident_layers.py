"""What the plan counts of frozen weights that do not all stay, against the model that is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.config.schema import RunConfig
from fitune.models.build import build_quantised
from fitune.models.folder import FolderSource
from fitune.plan.anatomy import Anatomy, read_anatomy
from fitune.plan.computation import Computation
from fitune.plan.dry_run import Shape, probe_bytes, step_memory
from fitune.plan.planner import run_memory
from fitune.quant.stream import layer_groups
from tiny_models import BACKEND, config_of, write_model

LAYERS = 6


def anatomy_of(**settings: Any) -> Anatomy:
    run = RunConfig.model_validate({"data": {"train": ["none"]}})
    return read_anatomy(run, config_of("llama", num_hidden_layers=LAYERS, **settings), torch.bfloat16)


def test_layers_take_what_the_built_ones_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    source = FolderSource(write_model(tmp_path / "model", num_hidden_layers=LAYERS))
    model = build_quantised(source, torch.bfloat16, BACKEND)
    built = [sum(p.nf4().size_bytes for p in group) for group in layer_groups(model)]
    assert anatomy_of().layer_bytes == tuple(built)


def test_what_stays_what_computes_and_what_comes() -> None:
    anatomy = anatomy_of()
    layer = anatomy.layer_bytes[0]
    table = 320 * 64 * 2  # of embeddings, which the head does not share
    assert (anatomy.end_bytes, anatomy.head_bytes) == (table, table)
    assert anatomy.resident_bytes(None) == anatomy.frozen_bytes
    assert anatomy.resident_bytes(0) == anatomy.frozen_bytes - (LAYERS - 2) * layer - 2 * table
    assert anatomy.resident_bytes(3) == anatomy.frozen_bytes - (LAYERS - 3 - 2) * layer - 2 * table
    more = table - 2 * layer
    assert [anatomy.visiting_bytes(resident) for resident in (0, 3, LAYERS, None)] == [more, more, 0, 0]
    assert anatomy.resident_bytes(LAYERS) == anatomy.resident_bytes(LAYERS + 5) == anatomy.frozen_bytes


def test_a_table_that_is_the_head_too_is_counted_once() -> None:
    anatomy = anatomy_of(tie_word_embeddings=True)
    table = 320 * 64 * 2
    assert (anatomy.end_bytes, anatomy.head_bytes) == (0, table)
    assert anatomy.resident_bytes(0) == anatomy.frozen_bytes - (LAYERS - 2) * anatomy.layer_bytes[0] - table


@pytest.mark.parametrize("vocabulary", [320, 20_000])
def test_the_peak_is_at_the_logits_where_the_head_is_large(vocabulary: int) -> None:
    run = RunConfig.model_validate({"data": {"train": ["none"]}, "train": {"resident_layers": 0}})
    config = config_of("llama", num_hidden_layers=LAYERS, vocab_size=vocabulary)
    held = run_memory(run, config, Computation(torch.bfloat16, BACKEND, 1, "a test"), Shape(1, 64, 64, 40))
    anatomy, step = held.anatomy, held.step
    assert step.optimizer < step.at_head < step.resident
    weights = anatomy.resident_bytes(0) + anatomy.trained_bytes
    head = vocabulary * 64 * 2 - 2 * anatomy.layer_bytes[0]
    is_large = head > step.resident - step.at_head
    assert is_large == (vocabulary == 20_000)
    assert held.at_peak(0) == ((weights + head, step.at_head) if is_large else (weights, step.resident))
    assert held.at_peak(None) == (anatomy.frozen_bytes + anatomy.trained_bytes, step.resident)


def test_the_probe_of_all_layers_takes_what_the_run_takes() -> None:
    run = RunConfig.model_validate({"data": {"train": ["none"]}})
    config, anatomy = config_of("llama", num_hidden_layers=LAYERS), anatomy_of()
    step = step_memory(run, config, anatomy, Shape(1, 64, 64, 40), torch.bfloat16, BACKEND)
    sizes = [probe_bytes(anatomy, step, layers) for layers in range(1, LAYERS + 2)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == sizes[-2]  # there are no more layers
    assert sizes[0] < 0.7 * sizes[-1]
    whole = anatomy.frozen_bytes + anatomy.trained_bytes + step.resident
    assert whole <= sizes[-1] <= whole + 2 * anatomy.trained_bytes
