"""Building a graph leaves the configuration that it is built from alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fitune.models.find import find_model
from fitune.models.graph import build_graph, use_plain_experts
from fitune.models.store import open_store
from tiny_models import BACKEND, config_of, write_model


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_configuration_stays_as_it_is(family: str) -> None:
    config = config_of(family, dtype=torch.float16)
    before = config.to_dict()
    model = build_graph(config, torch.bfloat16)
    use_plain_experts(model)
    assert model.config.dtype == torch.bfloat16
    assert config.to_dict() == before
    assert config.dtype == torch.float16


@pytest.mark.parametrize(("dtype", "vectors"), [(torch.float32, torch.float32), (torch.float16, torch.float16)])
def test_a_store_keeps_its_sources_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vectors: torch.dtype
) -> None:
    """Vectors of a 32-bit model stay in 32 bits; the store's making does not change what the source says it is."""
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    source = find_model(str(write_model(tmp_path / "model", dtype=dtype)))
    store = open_store(source, BACKEND)
    assert {store.tensor(name).dtype for name in store.plain if "norm" in name} == {vectors}
    assert source.config.dtype == dtype
