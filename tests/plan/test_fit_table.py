"""The table of methods against memory: lines that are never too low, cells in order, and the model's limit."""

from __future__ import annotations

import itertools

import pytest

from fitune.config.schema import RunConfig
from fitune.plan.elsewhere import peak_on
from fitune.plan.fit_table import CPU_SIZES, GPU_SIZES, METHODS, bytes_at, fit_table, peaks_needed, row_lengths
from fitune.plan.machines import find_machine
from fitune.plan.planner import Workload
from tiny_models import config_of

RUN = RunConfig.model_validate({"model": "tiny", "data": {"train": "a"}, "lora": {"rank": 4}})


def test_lines_between_and_beyond() -> None:
    peaks = {256: 100, 2048: 200, 8192: 800}
    assert [bytes_at(tokens, peaks) for tokens in (256, 1152, 2048, 5120, 8192, 14336)] == [
        100, 150, 200, 500, 800, 1400,
    ]  # fmt: skip
    assert bytes_at(9999, {256: 7}) == 7


def test_rows_reach_the_models_limit() -> None:
    assert row_lengths(config_of("llama", max_position_embeddings=1000)) == (256, 512, 1000)
    assert row_lengths(config_of("llama", max_position_embeddings=1024)) == (256, 512, 1024)
    assert row_lengths(config_of("llama", max_position_embeddings=100)) == (100,)


def kinked(tokens: int) -> int:
    """Gradients of 1000 at the end of the backward pass, or activations at its start."""
    return max(1000 + tokens // 100, tokens // 10)


def test_lengths_are_added_until_activations_outweigh_the_gradients() -> None:
    """Where they do not at the last length, a line would be far too low beyond it."""
    peaks = peaks_needed(kinked, 10**9, 131072, 1000, masks=False)
    assert sorted(peaks) == [256, 2048, 8192, 32768]
    assert bytes_at(131072, peaks) == pytest.approx(kinked(131072), rel=0.15)
    assert bytes_at(131072, {tokens: kinked(tokens) for tokens in (256, 2048, 8192)}) < 0.2 * kinked(131072)
    assert sorted(peaks_needed(kinked, 10**9, 131072, 10, masks=False)) == [256, 2048, 8192]
    assert sorted(peaks_needed(kinked, 10**9, 131072, 10, masks=True))[-1] == 131072
    assert sorted(peaks_needed(kinked, 500, 131072, 10, masks=True)) == [256]
    assert sorted(peaks_needed(kinked, 10**9, 1000, 10**6, masks=True)) == [256, 1000]


@pytest.mark.slow
def test_every_method_has_every_size() -> None:
    table = fit_table(RUN, "tiny", config_of("llama", num_hidden_layers=2, max_position_embeddings=4096))
    sizes = [("gpu", find_machine(None, size, 1).memory_bytes) for size in GPU_SIZES]
    sizes += [("cpu", find_machine(f"cpu:{size}", None, 1).memory_bytes) for size in CPU_SIZES]
    expected = [(*method, *size) for method, size in itertools.product(METHODS, sizes)]
    assert [(cell.method, cell.optimizer, cell.kind, cell.memory_bytes) for cell in table.cells] == expected
    assert table.dry_run_tokens[0] == 256
    assert table.lengths[-1] == 4096
    assert all(cell.longest_tokens == 4096 and cell.missing_bytes == 0 for cell in table.cells)


def test_a_line_is_not_too_low_between_two_dry_runs() -> None:
    card, config, run = find_machine("t4", None, 1), config_of("llama", num_hidden_layers=3), RUN

    def peak(tokens: int) -> int:
        return peak_on(card, run, config, Workload(0, 0, tokens, 0.5, tokens))

    peaks = {tokens: peak(tokens) for tokens in (256, 2048)}
    assert bytes_at(1000, peaks) >= 0.999 * peak(1000)
