"""The published measurements are told in full, and what was done otherwise is counted as its words say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import plan_published
import pytest
import torch
from published_differences import HOLES, SAVED, STATES, TRAINED, WORKSPACES, Difference
from published_memory import Published, published_rows
from transformers import AutoModelForCausalLM

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "plan_published.json"
TOLERANCE = 0.25
ROWS = list(published_rows())


def small(**changes: object) -> Published:
    """A measurement of two rows of 16 tokens, quick to plan."""
    row = next(row for row in ROWS if row.model == "tinyllama-1.1b")
    return replace(row, rows=2, row_tokens=16, **changes)


def test_there_are_measurements_of_every_method_and_each_is_told_once() -> None:
    assert len(ROWS) >= 20
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.method for row in ROWS} == {"full", "lora", "qlora"}
    assert len({row.source.url for row in ROWS}) >= 6


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_measurement_has_a_known_card_settings_and_sources(row: Published) -> None:
    assert plan_published.machine_of(row).count == row.count
    run = plan_published.run_settings(row)
    assert (run.train.micro_batch, run.data.max_tokens) == (row.rows, row.row_tokens)
    assert run.lora.rank == row.rank or row.method == "full"
    assert plan_published.model_config(row.model).get_text_config().num_hidden_layers > 0
    for url in (row.source.url, *row.source.settings):
        assert url.startswith("https://")
        assert "/blob/" not in url or re.search("/blob/[0-9a-f]{40}/", url), "a file without its commit"


def test_the_counts_of_the_models_are_the_published_ones() -> None:
    """Parameters: https://huggingface.co/Qwen (1.8, 14, 72 billion), phi-1.5 1.42, StableLM 3.64, bloomz 7.07."""
    sizes = {"qwen-1.8b": 1.84, "qwen-14b": 14.17, "qwen-72b": 72.29, "phi-1.5": 1.42, "stablelm-alpha-3b": 3.64,
             "tinyllama-1.1b": 1.10, "bloomz-7b1": 7.07}  # fmt: skip
    for name, billions in sizes.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plan_published.model_config(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005), name


def test_what_a_difference_adds() -> None:
    row = small(count=2)
    config = plan_published.model_config(row.model)
    items = {TRAINED: 400, STATES: 1000, SAVED: 100, WORKSPACES: 50, HOLES: 7}

    def added(**amounts: object) -> float:
        return plan_published.added_bytes(Difference("", "", **amounts), items, row, config)

    tokens, width, layers, feed_forward, vocabulary = 32, 2048, 22, 5632, 32000
    assert added(times=((STATES, 0.5),)) == -250  # half of it on each of two cards
    assert added(times=((SAVED, 0.0),)) == -100  # each card has its own
    assert added(per_trained_weight=-2.0) == -200
    assert added(per_logit=12.0) == 12 * tokens * vocabulary - 50
    assert added(per_logit=1e-6) == 0  # less than the workspaces in whose place they are
    assert added(per_layer_input=-2.0) == -2 * tokens * width * layers
    assert added(per_feed_forward=6.0) == 6 * tokens * feed_forward * layers
    assert added(per_vocabulary_weight=2.0) == 2 * 2 * vocabulary * width
    assert added(constant=5) == 5


def test_a_measurement_is_planned() -> None:
    row = plan_published.planned(small(method="qlora", rank=4, targets=("q_proj",)))
    assert row.problem is None
    assert row.items is not None
    # NF4: half a byte and its scales for what is no embedding or head, which are 16-bit.
    assert row.items["frozen weights"] == pytest.approx(0.516 * 968e6 + 2 * 2 * 32000 * 2048, rel=0.01)
    assert row.planned_bytes < sum(row.items.values())  # the source counts tensors alone
    cells = plan_published.row_cells(row)
    assert len(cells) == len(plan_published.COLUMNS)
    assert plan_published.row_cells(replace(row, problem="no\nplan"))[-1] == "no plan"


def test_a_source_that_is_not_there_ends_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan_published.parse(["--only", "hearsay"])
    assert "no source called hearsay" in capsys.readouterr().err


def test_the_result_explains_every_row() -> None:
    """Within a quarter, or there is a reason; and with the reasons applied, within a quarter."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert [row["case"] for row in result["rows"]] == [row.name for row in ROWS]
    for row in result["rows"]:
        assert row["problem"] is None
        ratio = row["planned_bytes"] / row["published_bytes"]
        assert abs(ratio - 1) <= TOLERANCE or row["differences"], row["case"]
        assert row["their_way_bytes"] / row["published_bytes"] == pytest.approx(1, abs=TOLERANCE), row["case"]
        assert set(row["differences"]) <= set(result["reasons"])


def test_without_its_reasons_the_list_would_not_hold() -> None:
    """A mutation: the same rows with nothing done otherwise."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    apart = [row for row in result["rows"] if abs(row["planned_bytes"] / row["published_bytes"] - 1) > TOLERANCE]
    assert len(apart) >= 10
