"""Both sides continue the same prompts greedily by as many tokens, and the same ones in float32's absence of ties."""

from __future__ import annotations

from pathlib import Path

import generation_speed
import pytest
import speed_inputs
from speed_generation import FituneGeneration, TransformersGeneration, checked
from tiny_case import TINY

from fitune.errors import FituneError

PROMPTS = [[5 * row + place for place in range(12)] for row in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speed_inputs.model_folder(TINY, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("four_bit", [False, True])
def test_both_sides_continue_by_as_many_tokens(
    model: Path, four_bit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    ours, seconds = FituneGeneration(model, PROMPTS, 6, four_bit).generate()
    theirs, _ = TransformersGeneration(model, PROMPTS, 6, 1).generate()
    assert [len(one) for one in ours] == [len(one) for one in theirs] == [6, 6, 6]
    assert seconds > 0
    if not four_bit:  # the same weights: near ties apart, the same tokens
        same = [generation_speed.same_beginning(*pair) for pair in zip(ours, theirs, strict=True)]
        assert max(same) > 0


def test_continuations_that_end_early_are_not_compared() -> None:
    with pytest.raises(FituneError, match=r"of \[2\] tokens, not of 3"):
        checked([[1, 2]], 3)


def test_continuations_are_compared_up_to_where_they_part() -> None:
    assert generation_speed.same_beginning([1, 2, 3], [1, 2, 4]) == 2
    assert generation_speed.same_beginning([1, 2, 3], [1, 2, 3]) == 3


def test_options_and_cells(capsys: pytest.CaptureFixture[str]) -> None:
    assert generation_speed.parse([]).batches == [1, 32]
    with pytest.raises(SystemExit):
        generation_speed.parse(["--batches", "1,many"])
    assert "--batches" in capsys.readouterr().err
    row = generation_speed.Row(32, "NF4", 500.0, 100.0, 5.0, 10**9, 2 * 10**9, 0.5, 60.0)
    assert generation_speed.row_cells(row) == ["32", "NF4", "500", "100", "5.00", "1.00", "2.00", "0.50", "60 of 64"]
    row.problem = "failed: x"
    assert len(generation_speed.row_cells(row)) == len(generation_speed.COLUMNS)
