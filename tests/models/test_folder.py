from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fitune.errors import InputError
from fitune.models.folder import FolderSource
from fitune.models.source import _sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in bfloat16 as `save_pretrained` writes it, in several shards, with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=[2, 5],
    )
    path = tmp_path / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    backend = Tokenizer(models.BPE(vocab={chr(32 + i): i for i in range(95)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="#").save_pretrained(path)
    return path


def test_reads_what_transformers_reads(folder: Path) -> None:
    source = FolderSource(folder)
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert set(source.tensor_names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == torch.bfloat16
    assert (source.kind, source.note) == ("folder", None)
    assert source.config.dtype == torch.bfloat16
    assert source.generation_eos_ids() == [2, 5]
    assert source.tokenizer()("hi")["input_ids"] == [ord("h") - 32, ord("i") - 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_every_source_dtype_in_one_file_and_in_many(folder: Path, dtype: torch.dtype, shard: str) -> None:
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    target = folder.parent / "again"
    expected.save_pretrained(target, max_shard_size=shard)
    assert (len(list(target.glob("*.safetensors"))) > 1) is (shard == "20KB")
    source = FolderSource(target)
    assert source.config.dtype == dtype
    for name, value in expected.state_dict().items():
        assert source.dtype(name) == dtype
        assert torch.equal(source.read(name), value)


def test_reading_is_zero_copy(folder: Path) -> None:
    source = FolderSource(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    assert source.read(name).data_ptr() == source.read(name).data_ptr()


def test_a_single_file_reads_alike(folder: Path, tmp_path: Path) -> None:
    weights = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    single = tmp_path / "single"
    single.mkdir()
    save_file(weights, single / "model.safetensors")
    (single / "config.json").write_bytes((folder / "config.json").read_bytes())
    first, second = FolderSource(folder), FolderSource(single)
    assert set(first.tensor_names()) == set(second.tensor_names())
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.tensor_names())


def test_companions_are_copied_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.mkdir()
    FolderSource(folder).write_companions(target)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()
    assert not list(target.glob("*.safetensors*"))


def test_fingerprint_follows_every_file_that_matters(folder: Path) -> None:
    first = FolderSource(folder).fingerprint()
    assert FolderSource(folder).fingerprint() == first
    (folder / "README.md").write_text("no part of the model")
    assert FolderSource(folder).fingerprint() == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert FolderSource(folder).fingerprint() != first


def test_identity_is_that_of_the_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    first = FolderSource(folder).identity()
    copy = tmp_path / "elsewhere" / "under another name"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # other times, too
    (copy / "tokenizer_config.json").write_text("{}")
    assert FolderSource(copy).identity() == first
    assert FolderSource(copy).fingerprint() != FolderSource(folder).fingerprint()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert FolderSource(copy).identity() != first


@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.77, 1.0])
def test_identity_sees_a_change_to_a_five_hundredth_of_a_file(folder: Path, share: float) -> None:
    torch.manual_seed(0)
    file = folder / "model-big.safetensors"
    save_file({"model.embed_tokens.weight": torch.randn(96, 32), "more": torch.randn(2**20)}, file)
    first = _sample(file)
    content = bytearray(file.read_bytes())
    length = len(content) // 500
    start = round(share * (len(content) - length))
    content[start : start + length] = bytes(255 - value for value in content[start : start + length])
    file.write_bytes(content)
    assert _sample(file) != first


def test_all_problems_are_told_at_once(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-7])
    (folder / "config.json").unlink()
    with pytest.raises(InputError) as caught:
        FolderSource(folder)
    text = "\n".join(caught.value.problems)
    assert f"1 of {len(shards)} shards are missing: {shards[0].name}" in text
    assert f"{shards[1].name} is cut short or damaged" in text
    assert "config.json is missing" in text
    assert len(caught.value.problems) == 3


def test_a_tensor_that_the_index_promises_and_no_file_holds(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"1 tensors that no file holds.*model\.layers\.9"):
        FolderSource(folder)


def _config(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_configurations_that_cannot_be_used(folder: Path) -> None:
    kept = (folder / "config.json").read_bytes()
    for changed, words in (
        (
            {"model_type": "chatglm", "auto_map": {"AutoConfig": "x.Y"}},
            "'chatglm' is no causal language model",
        ),
        ({"model_type": "vit"}, "'vit' is no causal language model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes quantised the weights, and none"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised by hqq, which nothing here decodes"),
    ):
        (folder / "config.json").write_bytes(kept)
        _config(folder, **changed)
        with pytest.raises(InputError, match=words):
            FolderSource(folder)
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        FolderSource(folder)


def test_folders_without_safetensors(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(InputError, match="no weights"):
        FolderSource(folder)
    (folder / "consolidated.00.pth").write_bytes(b"x")
    with pytest.raises(InputError, match=r"only pickled weights that no convention names \(consolidated\.00\.pth\)"):
        FolderSource(folder)
    (folder / "a.Q4_0.gguf").write_bytes(b"x")
    with pytest.raises(InputError, match=r"give the file itself, e\.g\. .*a\.Q4_0\.gguf"):
        FolderSource(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(InputError, match=r"LoRA adapter.*'owner/base'"):
        FolderSource(adapter)


def test_tensors_of_other_types_are_refused(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(InputError, match=f"tensor {name} is stored as F8_E4M3"):
        FolderSource(folder)


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the tokenizer cannot be read"):
        FolderSource(folder).tokenizer()
