from __future__ import annotations

from pathlib import Path

import pytest

from fitune import config
from fitune.errors import InputError


def load(folder: Path, *overrides: str) -> config.RunConfig:
    (folder / "a.jsonl").touch()
    run = folder / "run.yaml"
    run.write_text("data:\n  train: a.jsonl\n  max_tokens: 512\ntrain:\n  micro_batch: 2\n")
    return config.load(run, overrides)


@pytest.mark.parametrize(("tokens", "count"), [(1024, 1), (4096, 4), (5000, 5), (100_000, 98)])
def test_accumulation_follows(tmp_path: Path, tokens: int, count: int) -> None:
    found = load(tmp_path, f"train.tokens_per_step={tokens}")
    assert found.train.accumulation == count
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(found))
    assert config.load(again) == found


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one micro-batch alone has 1024 tokens"):
        load(tmp_path, "train.tokens_per_step=1000")
    with pytest.raises(InputError, match=r"given together with train\.accumulation"):
        load(tmp_path, "train.tokens_per_step=4096", "train.accumulation=3")
