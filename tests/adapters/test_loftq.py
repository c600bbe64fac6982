"""LoftQ against PEFT's own decomposition: the best that a rank can do for what 4 bits lost, and no more than that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor

from fitune.adapters.loftq import best_of_rank, make_up_for_four_bits, stored_weight
from fitune.adapters.lora import inject
from fitune.errors import InputError
from fitune.fuse.adapter_layers import fused_lora_layer
from fitune.models.build import build_dense, build_quantised
from fitune.models.folder import FolderSource
from fitune.models.graph import head_name
from tiny_models import BACKEND, distance, write_model

TOKENS = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))


def corrected(source: FolderSource, made: bool = True, **settings: Any) -> Any:
    arguments = {"rank": 8, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear", "rslora": False, **settings}
    graph = build_quantised(source, torch.float32, BACKEND)
    model = inject(graph, head_name(graph), seed=1, base_name="tiny", layer=fused_lora_layer, **arguments)
    if made:
        make_up_for_four_bits(model, source, seed=0)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FolderSource:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    return FolderSource(write_model(tmp_path / "model", getattr(request, "param", "llama")))


@pytest.mark.parametrize("source", ["llama", "gpt2", "mixtral"], indirect=True)
@pytest.mark.parametrize("rslora", [False, True])
def test_equals_pefts_decomposition(source: FolderSource, rslora: bool) -> None:
    """gpt2 keeps weights transposed; mixtral's experts have no adapter."""
    model = corrected(source, rslora=rslora)
    graph, count = build_dense(source, torch.float32, trainable=False), 0
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        stored = stored_weight(module)
        assert stored is not None
        lost = graph.get_parameter(f"{name.removeprefix('base_model.model.')}.weight") - stored.dense()
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        found = module.scaling["default"] * (b @ a)
        expected = _low_rank_decomposition(lost.t() if "gpt2" in str(type(graph)).lower() else lost, reduced_rank=8)
        assert distance(found, expected["L"] @ expected["R"]) < 1e-4
        assert distance(a.norm(dim=1), expected["R"].norm(dim=1)) < 1e-4
        count += 1
    assert count == {"llama": 14, "gpt2": 8, "mixtral": 8}[graph.config.model_type]


def test_the_model_is_nearer_to_the_one_in_16_bits(source: FolderSource) -> None:
    dense = logits(build_dense(source, torch.float32, trainable=False))
    plain = distance(logits(corrected(source, made=False)), dense)
    distances = [distance(logits(corrected(source, rank=rank)), dense) for rank in (8, 32)]
    assert distances[0] < 0.9 * plain
    assert distances[1] < 0.5 * plain
    whole = corrected(source, rank=70)  # more than the weights have: nothing is left to make up for
    assert distance(logits(whole), dense) < 1e-3


def test_with_lengths_of_its_own(source: FolderSource) -> None:
    """DoRA begins with those of the corrected weights, and so changes nothing."""
    assert distance(logits(corrected(source, dora=True)), logits(corrected(source))) < 1e-5


def test_large_matrices_are_decomposed_nearly_as_well() -> None:
    """On noise, where no singular value stands out; twice gives the same bits."""
    matrix = torch.randn(1100, 1040, generator=torch.Generator().manual_seed(1))
    found = [best_of_rank(matrix, 16, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    best = torch.linalg.svdvals(matrix)[:16].square().sum()
    b, a = found[0]
    assert (b.shape, a.shape) == ((1100, 16), (16, 1040))
    kept = matrix.square().sum() - (matrix - b @ a).square().sum()
    assert 0.99 < float(kept / best) < 1.0001


def test_where_nothing_was_lost_it_is_refused(source: FolderSource, tmp_path: Path) -> None:
    from fitune.models.store import open_store

    store = open_store(source, BACKEND)
    four = FolderSource(store.folder)
    with pytest.raises(InputError, match="nothing that loftq could make up for"):
        corrected(four)
