"""Folders as transformers and bitsandbytes write them; the reference is what the two of them decode."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fitune.errors import InputError
from fitune.models.build import build_quantised
from fitune.models.folder import FolderSource
from fitune.models.store import open_store
from fitune.quant.linear import QuantisedLinear
from fitune.quant.nf4 import quantise
from tiny_models import BACKEND, tokenizer, write_model

pytest.importorskip("bitsandbytes")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quantised(tmp_path: Path, dtype: torch.dtype = torch.bfloat16, family: str = "llama", **settings: Any) -> Path:
    plain = write_model(tmp_path / "plain", family, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=dtype, device_map="cpu", quantization_config=BitsAndBytesConfig(**settings)
    )
    model.save_pretrained(tmp_path / "quantised")
    tokenizer().save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


def decoded_by_transformers(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    return model.dequantize().state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nf4_is_used_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = quantised(tmp_path, dtype, **NF4)
    source = FolderSource(folder)
    plain = FolderSource(tmp_path / "plain")
    assert set(source.tensor_names()) == set(plain.tensor_names())
    assert source.quantised_folder() == folder
    assert source.note == "4-bit base: the NF4 weights of the folder itself; methods other than qlora decode them"
    linears = 0
    expected = decoded_by_transformers(folder)
    for name in source.tensor_names():
        assert source.shape(name) == plain.shape(name)
        assert source.dtype(name) == dtype
        assert torch.equal(source.read(name), expected[name].to(dtype)), name
        weight = source.nf4(name)
        if weight is None:
            continue
        linears += 1
        ours = quantise(plain.read(name), BACKEND)
        assert torch.equal(weight.codes, ours.codes)
        assert torch.equal(weight.absmax, ours.absmax)
        assert torch.equal(weight.nested_absmax, ours.nested_absmax)
        assert weight.dtype == dtype
    assert linears == 14
    assert source.config.dtype == dtype
    assert not hasattr(source.config, "quantization_config")


def test_nf4_weights_are_views_of_the_file(tmp_path: Path) -> None:
    source = FolderSource(quantised(tmp_path, **NF4))
    name = "model.layers.1.mlp.up_proj.weight"
    first, second = source.nf4(name), source.nf4(name)
    assert first is not None
    assert second is not None
    assert first.codes.data_ptr() == second.codes.data_ptr()
    assert source.nf4("model.norm.weight") is None


def test_no_second_store_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    folder = quantised(tmp_path, **NF4)
    source = FolderSource(folder)
    assert open_store(source, BACKEND).folder == folder
    assert not (tmp_path / "cache").exists()
    model = build_quantised(source, torch.float32, BACKEND)
    expected = decoded_by_transformers(folder)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    assert len(linears) == 14
    for name, linear in linears.items():
        found = linear.nf4().dense(torch.bfloat16, BACKEND)
        assert torch.equal(found, expected[f"{name}.weight"].to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({**NF4, "bnb_4bit_use_double_quant": False}, "NF4 without double quantisation"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}, "FP4"),
        ({"load_in_8bit": True}, "INT8"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_kinds_are_decoded_to_the_bits_of_transformers(
    tmp_path: Path, dtype: torch.dtype, settings: dict[str, Any], kind: str
) -> None:
    folder = quantised(tmp_path, dtype, **settings)
    source = FolderSource(folder)
    expected = decoded_by_transformers(folder)
    assert source.quantised_folder() is None
    assert source.note == f"16-bit weights de-quantised from bitsandbytes {kind}"
    assert set(source.tensor_names()) == set(FolderSource(tmp_path / "plain").tensor_names())
    for name in source.tensor_names():
        assert source.nf4(name) is None
        assert source.dtype(name) == dtype
        assert torch.equal(source.read(name), expected[name].to(dtype)), name


def test_codes_packed_into_other_types_are_decoded(tmp_path: Path) -> None:
    plain = quantised(tmp_path / "bytes", **NF4)
    packed = quantised(tmp_path / "halves", **NF4, bnb_4bit_quant_storage=torch.bfloat16)
    first, second = FolderSource(plain), FolderSource(packed)
    assert second.quantised_folder() is None
    for name in first.tensor_names():
        assert torch.equal(first.read(name), second.read(name)), name


def test_a_missing_library_is_named_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = quantised(tmp_path / "double", **NF4)
    single = quantised(tmp_path / "single", **{**NF4, "bnb_4bit_use_double_quant": False})
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # an import of it now fails
    assert FolderSource(double).quantised_folder() == double
    with pytest.raises(InputError, match=r"NF4 without double quantisation .* pip install bitsandbytes"):
        FolderSource(single)


def test_companions_are_those_of_a_plain_model(tmp_path: Path) -> None:
    folder = quantised(tmp_path, **NF4)
    target = tmp_path / "copy"
    target.mkdir()
    FolderSource(folder).write_companions(target)
    written = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == "bfloat16"
    assert (target / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    folder = quantised(tmp_path, **NF4)
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({key: value for key, value in weights.items() if key != f"{name}.absmax"}, path)
    with pytest.raises(InputError, match=rf"{name}: bitsandbytes' state beside it cannot be read"):
        FolderSource(folder)
    save_file(weights | {name: weights[name][:-1].clone()}, path)
    with pytest.raises(InputError, match=rf"{name}: \d+ bytes and .* do not make a weight"):
        FolderSource(folder)
    state = f"{name}.quant_state.bitsandbytes__nf4"
    save_file({key: value for key, value in weights.items() if key != state}, path)
    with pytest.raises(InputError, match=f"tensor {name} is stored as U8"):
        FolderSource(folder)


def test_transposed_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transposes its layers' weights"):
        FolderSource(quantised(tmp_path, family="gpt2", **NF4))


def test_a_store_is_such_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    plain = FolderSource(write_model(tmp_path / "plain"))
    store = open_store(plain, BACKEND)
    source = FolderSource(store.folder)
    assert source.quantised_folder() == store.folder
    assert source.note is not None
    assert source.note.startswith(f"a store of {plain.reference}; 4-bit base: the NF4 weights")
    assert set(source.tensor_names()) == set(plain.tensor_names())
    for name in store.quantised:
        assert torch.equal(source.read(name), store.weight(name).dense(torch.bfloat16, BACKEND))
        assert source.shape(name) == plain.shape(name)
    for name in store.plain:
        assert torch.equal(source.read(name), store.tensor(name))
    assert source.tokenizer()("SELECT 1")["input_ids"] == plain.tokenizer()("SELECT 1")["input_ids"]
    for file in store.folder.glob("tokenizer*"):
        file.unlink()
    source = FolderSource(store.folder)
    with pytest.raises(InputError, match=f"give the model that it was made from: {plain.reference}"):
        source.tokenizer()
