"""The table of methods against memory: lines that are never too low, cells in order, and the model's limit."""

from __future__ import annotations

import itertools

import pytest

from fitune.config.schema import RunConfig
from fitune.plan.elsewhere import peak_on
from fitune.plan.fit_table import CPU_SIZES, GPU_SIZES, METHODS, FitTable, bytes_at, fit_table, row_lengths
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


@pytest.fixture(scope="module")
def table() -> FitTable:
    return fit_table(RUN, "tiny", config_of("llama", num_hidden_layers=2, max_position_embeddings=4096))


def test_every_method_has_every_size(table: FitTable) -> None:
    sizes = [("gpu", find_machine(None, size, 1).memory_bytes) for size in GPU_SIZES]
    sizes += [("cpu", find_machine(f"cpu:{size}", None, 1).memory_bytes) for size in CPU_SIZES]
    expected = [(*method, *size) for method, size in itertools.product(METHODS, sizes)]
    assert [(cell.method, cell.optimizer, cell.kind, cell.memory_bytes) for cell in table.cells] == expected
    assert table.dry_run_tokens[0] == 256
    assert table.lengths[-1] == 4096
    assert all(cell.longest_tokens == 4096 and cell.missing_bytes == 0 for cell in table.cells)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_line_is_not_too_low_between_two_dry_runs(method: str) -> None:
    card, config = find_machine("t4", None, 1), config_of("llama", num_hidden_layers=3)
    run = RUN.model_copy(update={"method": method})

    def peak(tokens: int) -> int:
        return peak_on(card, run, config, Workload(0, 0, tokens, 0.5, tokens))

    peaks = {tokens: peak(tokens) for tokens in (256, 2048)}
    for between in (512, 1000):
        assert bytes_at(between, peaks) >= 0.999 * peak(between)
