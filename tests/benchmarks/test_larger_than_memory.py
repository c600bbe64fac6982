"""Random checkpoints in 4 bits are what they say, and a run on one within a budget has the bits of one without."""

from __future__ import annotations

import math
from pathlib import Path

import larger_than_memory
import pytest
import torch
from larger_than_memory import RandomCheckpoint, Row

from fitune.models.find import find_model
from fitune.models.store import open_store

TINY = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_random_checkpoint_is_opened_as_it_is(tmp_path: Path) -> None:
    random = RandomCheckpoint(TINY)
    random.write(tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert written == pytest.approx(random.size_bytes, rel=0.05)
    store = open_store(find_model(str(tmp_path)), "reference")
    assert store.folder == tmp_path  # no second copy is made
    assert set(store.quantised) == random.quantised
    weight = store.weight("model.layers.0.mlp.up_proj.weight").dense(torch.float32, "reference")
    assert bool(torch.isfinite(weight).all())
    assert 0.005 < float(weight.std()) < 0.05
    assert not torch.equal(
        weight, store.weight("model.layers.1.mlp.up_proj.weight").dense(torch.float32, "reference")
    )


def test_a_disk_too_small_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(larger_than_memory, "disk_free_bytes", lambda path: 10**9)
    with pytest.raises(
        larger_than_memory.InputError, match=r"left out: 4\.\d GB of disk are needed and 1\.0 GB are free"
    ):
        larger_than_memory.checkpoint("llama-2-7b", tmp_path, print)
    assert not list(tmp_path.iterdir())


def test_rows_tell_what_was_measured() -> None:
    row = Row(
        "7b", "2.5GB", 2_400_000_000, resident_layers=3, seconds=12.0, compute_seconds=11.0, same_bits=True, loss=1
    )
    assert larger_than_memory.row_cells(row) == ["7b", "2.5", "2.40", "3", "12.0", "11.0", "-", "yes", "1.000"]
    assert larger_than_memory.row_cells(Row("7b", "1GB", problem="no\nroom"))[-1] == "no room"
    assert math.isnan(Row("7b", "1GB").loss)


@pytest.mark.slow
def test_a_case_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(larger_than_memory.SHAPES, "tiny", TINY)
    monkeypatch.setitem(larger_than_memory.CASES, "tiny", larger_than_memory.Case("tiny", "1.5GB", True))
    row = larger_than_memory.measured("tiny", tmp_path, tmp_path, 1, 1, print)
    assert row.same_bits
    assert math.isfinite(row.loss)
    assert row.peak_bytes < 1.5e9
