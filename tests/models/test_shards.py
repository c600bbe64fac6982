"""Files of tensors written one by one, read by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fitune.models.shards import TensorPlan, plan_shards, write_file, write_shards

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "number": torch.tensor(3.5),
    "half": torch.randn(3, 7).bfloat16(),
    "turned": torch.randn(4, 3).t(),
    "none": torch.zeros(0, 4),
}
PLANS = [TensorPlan(name, tuple(value.shape), value.dtype) for name, value in TENSORS.items()]


def test_a_file_is_what_the_library_reads(tmp_path: Path) -> None:
    written = [plan.name for plan in write_file(tmp_path / "a.safetensors", PLANS, TENSORS.__getitem__)]
    assert sorted(written) == sorted(TENSORS)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items()
    )


def test_shards_are_cut_where_they_would_be_too_large(tmp_path: Path) -> None:
    shards = plan_shards(PLANS, 50)
    assert [[plan.name for plan in shard] for shard in shards] == [["bytes", "number"], ["half"], ["turned", "none"]]
    paths = write_shards(tmp_path, shards, TENSORS.__getitem__)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: load_file(tmp_path / file)[name].shape for name, file in index.items()} == {
        plan.name: torch.Size(plan.shape) for plan in PLANS
    }
    assert [path.name for path in paths] == sorted(set(index.values()))


def test_a_tensor_that_is_not_what_was_planned_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="number: planned"):
        list(write_file(tmp_path / "a.safetensors", PLANS, lambda name: TENSORS[name].double()))
