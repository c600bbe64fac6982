"""What is drawn, and what counts as within a budget."""

from __future__ import annotations

import itertools

import budget_runs
from budget_runs import Draw, Row

DRAW = Draw("smollm2-135m", 10**9, 512)


def test_draws_are_the_same_for_a_seed_and_cover_models_and_lengths() -> None:
    some = list(itertools.islice(budget_runs.draws(0), 60))
    assert some == list(itertools.islice(budget_runs.draws(0), 60))
    assert some != list(itertools.islice(budget_runs.draws(1), 60))
    assert {draw.model for draw in some} == set(budget_runs.BUDGETS)
    assert {draw.row_tokens for draw in some} == set(budget_runs.LENGTHS)
    for draw in some:
        least, most = budget_runs.BUDGETS[draw.model]
        assert least - 1e7 <= draw.budget_bytes <= most + 1e7


def test_only_what_ended_under_its_budget_or_was_refused_is_within() -> None:
    assert Row(DRAW, "done", 10**9).is_within
    assert Row(DRAW, "refused").is_within
    assert not Row(DRAW, "done", 10**9 + 1).is_within
    assert not Row(DRAW, "killed").is_within
    assert not Row(DRAW, "error: something").is_within


def test_a_row_tells_what_was_chosen() -> None:
    cells = budget_runs.row_cells(Row(DRAW, "done", 900_000_000, 880_000_000, ("method=qlora", "micro_batch=1")))
    assert cells == ["smollm2-135m", "4 x 512", "1.00", "0.90", "0.90", "0.88", "method=qlora micro_batch=1", "done"]
