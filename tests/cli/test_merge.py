"""`fitune merge` on a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TrainedRun, call, facts_of


@pytest.mark.slow
def test_a_merged_run_answers(trained: TrainedRun, tmp_path: Path) -> None:
    facts = facts_of("merge", trained.folder, "--output", tmp_path / "merged")
    assert facts["rounding_error"] <= facts["rounding_tolerance"]
    assert facts["merged_tensors"] > 0
    answer = facts_of("chat", tmp_path / "merged", "--prompt", "What is 3 plus 3?", "--max-new-tokens", 4)["answer"]
    assert answer
    code, _, err = call("merge", trained.folder, "--output", tmp_path / "merged")
    assert code == 2
    assert "is not empty" in err


def test_what_is_refused(tmp_path: Path) -> None:
    code, _, err = call("merge", tmp_path)
    assert code == 2
    assert "is no run (config.yaml)" in err
    code, _, err = call("merge", "bundled")
    assert code == 2
    assert "nothing to merge" in err
