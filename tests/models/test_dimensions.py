"""Dimensions: what is counted from a configuration is what the files and the quantiser really take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
from fitune.models.dimensions import dimensions, nf4_bytes
from fitune.models.find import find_model
from fitune.models.graph import build_graph, quantised_names
from fitune.models.preset_table import PRESETS
from fitune.models.presets import preset_config
from fitune.quant.nf4 import quantise


@pytest.mark.parametrize("shape", [(64, 64), (3, 100), (1, 1), (128, 16384)])
def test_nf4_takes_what_the_quantiser_makes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = quantise(torch.randn(shape, dtype=torch.bfloat16), "reference")
    made = sum(part.numel() * part.element_size() for part in (weight.codes, weight.absmax, weight.nested_absmax))
    assert nf4_bytes(shape[0] * shape[1]) == made + 4  # the offset


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_sizes_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    source = find_model(str(tiny_models.write_model(tmp_path, family)))
    found = dimensions(source.config)
    stored = sum(torch.Size(source.shape(name)).numel() for name in source.tensor_names())
    assert (found.parameters, found.bytes_16bit) == (stored, 2 * stored)
    assert (found.layers, found.hidden_size, found.heads, found.kv_heads, found.vocabulary) == (2, 64, 4, 2, 320)
    assert found.head_dim == source.shape("model.layers.0.self_attn.k_proj.weight")[0] // 2
    assert found.is_tied == ("lm_head.weight" not in source.tensor_names())


def test_nf4_counts_every_quantised_matrix_once() -> None:
    config = tiny_models.config_of("llama")
    graph = build_graph(config, torch.bfloat16)
    four_bits = [graph.get_parameter(name).numel() for name in quantised_names(graph)]
    rest = sum(parameter.numel() for parameter in graph.parameters()) - sum(four_bits)
    assert dimensions(config).bytes_nf4 == 2 * rest + sum(map(nf4_bytes, four_bits))


def test_a_known_size() -> None:
    """Llama 2 13B: 26 GB in 16 bits; in NF4 what QLoRA says of it, 4.127 bits a weight, and 16-bit embeddings."""
    found = dimensions(preset_config(next(preset for preset in PRESETS if preset.name == "llama-2-13b")))
    assert found.bytes_16bit == 26_031_728_640
    embeddings = 2 * 32000 * 5120
    assert found.bytes_nf4 == pytest.approx(2 * embeddings + (13_015_864_320 - embeddings) * 4.127 / 8, rel=1e-3)
    assert (found.head_dim, found.feed_forward, found.experts, found.is_tied) == (128, 13824, None, False)
