"""Quantised checkpoints; the reference is what transformers loads from the same folder, and formulas written out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GptOssConfig, GptOssForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from fitune.errors import InputError
from fitune.models.folder import FolderSource
from tiny_models import write_model

BLOCK = 128


def linears(weights: dict[str, Tensor]) -> list[str]:
    return [name for name in weights if ".layers." in name and name.endswith("proj.weight")]


def write_quantised(folder: Path, weights: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return folder


def fp8(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """FP8 codes and the factor of each block, blocks cut by the edge included."""
    height, width = weight.shape
    scales = torch.empty(-(-height // rows), -(-width // columns))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def fp8_folder(path: Path, block: list[int] | None, **sizes: int) -> Path:
    folder = write_model(path, **{"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, **sizes})
    weights = load_file(folder / "model.safetensors")
    for name in linears(weights):
        codes, scales = fp8(weights[name], *(block or weights[name].shape))
        weights |= {name: codes, f"{name}_scale_inv": scales if block else scales.reshape(())}
    weights["model.layers.0.mlp.up_proj.activation_scale"] = torch.tensor(0.5)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    return write_quantised(folder, weights, settings)


def test_fp8_is_decoded_as_transformers_does(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path / "m", [BLOCK, BLOCK])
    source = FolderSource(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert source.note == "16-bit weights de-quantised from FP8"
    assert set(source.tensor_names()) == set(expected)
    for name, value in expected.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(value.shape), torch.bfloat16)
        assert torch.equal(source.read(name), value), name
    assert not source.is_plain
    assert source.quantised_folder() is None


@pytest.mark.parametrize("block", [[BLOCK, BLOCK], [64, 32], None])
def test_fp8_with_blocks_that_the_edge_cuts(tmp_path: Path, block: list[int] | None) -> None:
    """192 rows are a block and a half: the grid alone would make it two blocks of 96."""
    source = FolderSource(fp8_folder(tmp_path / "m", block, intermediate_size=192))
    raw = load_file(tmp_path / "m" / "model.safetensors")
    for name in linears(raw):
        rows, columns = block or raw[name].shape
        scales = raw[f"{name}_scale_inv"].reshape(1, 1) if block is None else raw[f"{name}_scale_inv"]
        grid = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        grid = grid[: raw[name].shape[0], : raw[name].shape[1]]
        assert torch.equal(source.read(name), (raw[name].float() * grid).to(torch.bfloat16)), name


def test_the_grid_alone_would_decode_a_cut_block_wrongly(tmp_path: Path) -> None:
    """What the padding is for: transformers takes 192 rows and two scales for two blocks of 96."""
    source = FolderSource(fp8_folder(tmp_path / "m", [BLOCK, BLOCK], intermediate_size=192))
    raw = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    parts = {"weight": raw[name], "weight_scale_inv": raw[f"{name}_scale_inv"]}
    wrong = Fp8Dequantize(None).convert(parts)["weight"].to(torch.bfloat16)
    right = source.read(name)
    assert torch.equal(wrong[:96], right[:96])
    assert not torch.equal(wrong[96:128], right[96:128])


def test_fp8_without_its_scales_is_refused(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path / "m", [BLOCK, BLOCK])
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {key: value for key, value in weights.items() if key != f"{name}_scale_inv"}, folder / "model.safetensors"
    )
    with pytest.raises(InputError, match=rf"{name} is FP8, and its scale {name}_scale_inv is not there"):
        FolderSource(folder)
    save_file(weights | {f"{name}_scale_inv": torch.ones(3, 1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=rf"{name}_scale_inv has shape \(3, 1\)"):
        FolderSource(folder)


def test_mxfp4_is_decoded_as_transformers_does(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_local_experts=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=257, eos_token_id=256,
    )  # fmt: skip
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = weights.pop(name).shape
        blocks = torch.randint(256, (experts, outer, inner // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, (experts, outer, inner // 32), generator=generator, dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    write_quantised(tmp_path, weights, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    source = FolderSource(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert source.note == "16-bit weights de-quantised from MXFP4"
    assert set(source.tensor_names()) == set(expected)
    for name, value in expected.items():
        assert source.shape(name) == tuple(value.shape)
        assert torch.equal(source.read(name), value), name
    # One weight by the format's own rules (OCP Microscaling Formats 1.0, section 5.3): low nibble first.
    name = "model.layers.1.mlp.experts.down_proj"
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    code = int(weights[f"{name}_blocks"][2, 5, 1, 3]) >> 4
    value = (-1 if code & 8 else 1) * values[code & 7] * 2.0 ** (int(weights[f"{name}_scales"][2, 5, 1]) - 127)
    assert float(source.read(name)[2, 32 + 7, 5]) == value


SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "float8 by row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    "int8 by row": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    "int4": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_are_decoded_as_transformers_does(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    layout, arguments = SCHEMES[scheme]
    folder = write_model(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(layout)
    group = {"targets": ["Linear"], "weights": arguments, "format": layout}
    for name in linears(weights):
        weight = weights.pop(name)
        pieces = weight.float().reshape(weight.shape[0], -1, arguments.get("group_size", weight.shape[1]))
        scale = pieces.abs().amax(-1) / {"float8 by row": 448, "int8 by row": 127, "int4": 7}[scheme]
        state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
        made = compressor.compress(state, QuantizationScheme.model_validate(group))
        weights |= {f"{name.removesuffix('weight')}{end}": value for end, value in made.items()}
    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    write_quantised(folder, weights, settings)
    source = FolderSource(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    expected = loaded.state_dict()
    assert source.note is not None
    assert source.note.startswith(f"16-bit weights de-quantised from compressed-tensors {layout}")
    assert set(source.tensor_names()) == set(expected)
    for name, value in expected.items():
        assert source.shape(name) == tuple(value.shape)
        assert torch.equal(source.read(name), value), name


def test_awq_is_decoded(tmp_path: Path) -> None:
    """AutoAWQ's GEMM packing: eight outputs an int32, in the order 0 2 4 6 1 3 5 7 (arXiv 2306.00978)."""
    pytest.importorskip("compressed_tensors")
    folder = write_model(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    expected = {}
    for name in linears(weights):
        outer, inner = weights.pop(name).shape
        codes = torch.randint(16, (inner, outer), generator=generator)
        zeros = torch.randint(16, (inner // 32, outer), generator=generator)
        scales = torch.rand(inner // 32, outer, generator=generator).to(torch.float16)
        module = name.removesuffix("weight")
        weights |= {f"{module}qweight": packed(codes), f"{module}qzeros": packed(zeros), f"{module}scales": scales}
        whole = (codes - zeros.repeat_interleave(32, 0)).to(torch.float16) * scales.repeat_interleave(32, 0)
        expected[name] = whole.T.to(torch.bfloat16)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    source = FolderSource(write_quantised(folder, weights, settings))
    assert source.note == "16-bit weights de-quantised from AWQ (int4)"
    for name, value in expected.items():
        assert source.shape(name) == tuple(value.shape)
        assert torch.equal(source.read(name), value), name


def packed(codes: Tensor) -> Tensor:
    """[n, 8 m] numbers of four bits -> [n, m] int32."""
    result = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        result |= codes[:, column::8] << (4 * place)
    return result.to(torch.int32)


def test_what_nothing_here_decodes_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    write_quantised(folder, weights, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"quantised by gptq, which nothing here decodes .*give the original model"):
        FolderSource(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model:\n  - owner/Original-7B\n---\n# x\n")
    with pytest.raises(InputError, match=r"give the model in 16 bits: owner/Original-7B"):
        FolderSource(folder)
    write_quantised(folder, weights, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(InputError, match="says that fp8 quantised the weights, and none of them is"):
        FolderSource(folder)


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "awq", "bits": 4}, {"quant_method": "compressed-tensors", "format": "pack-quantized"}],
)
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)  # an import of it now fails
    folder = write_model(tmp_path / "m")
    write_quantised(folder, load_file(folder / "model.safetensors"), settings)
    with pytest.raises(
        InputError, match=r"decoded by the package compressed-tensors .*pip install compressed-tensors"
    ):
        FolderSource(folder)
