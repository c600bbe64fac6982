from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fitune.errors import InputError
from fitune.models.folder import FolderSource
from tiny_models import write_model


def pickled(folder: Path, shards: int = 1, **kwargs: object) -> dict[str, torch.Tensor]:
    """Turns a folder of `write_model` into one with pickled weights; gives the weights."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", **kwargs)
        return weights
    names = list(weights)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: weights[name] for name in names[number::shards]}, folder / file, **kwargs)
        weight_map |= dict.fromkeys(names[number::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weights


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pickled_weights_are_read_without_running_code(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    folder = write_model(tmp_path / "model", dtype=dtype)
    weights = pickled(folder, shards)
    source = FolderSource(folder)
    assert set(source.tensor_names()) == set(weights)
    for name, value in weights.items():
        assert torch.equal(source.read(name), value)
        assert (source.shape(name), source.dtype(name)) == (tuple(value.shape), dtype)
    assert source.config.dtype == dtype
    assert source.note == "weights read from a pickled .bin, tensors only"
    assert {path.name for path in source.files()} > {path.name for path in folder.glob("pytorch_model*")}


def test_pickled_weights_are_mapped_not_loaded(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    pickled(folder)
    source = FolderSource(folder)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert str(folder / "pytorch_model.bin") in mapped
    name = source.tensor_names()[0]
    assert source.read(name).data_ptr() == source.read(name).data_ptr()


def test_safetensors_win(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    torch.save({"evil": 1}, folder / "pytorch_model.bin")
    source = FolderSource(folder)
    assert source.note is None
    assert [path.name for path in source.files() if path.suffix in (".bin", ".safetensors")] == ["model.safetensors"]


def test_a_tied_head_in_a_pickled_file_has_no_name_of_its_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen2")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    assert "lm_head.weight" not in FolderSource(folder).tensor_names()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "lm_head.weight" in FolderSource(folder).tensor_names()


class Payload:
    """Unpickled, it would run a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        import os

        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    weights = pickled(folder)
    torch.save(weights | {"x": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"it wants to run \w+\.system.*never unpickles.*save_file"):
        FolderSource(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_files_that_are_no_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    weights = pickled(folder)
    path = folder / "pytorch_model.bin"
    torch.save({"model": weights, "epoch": 3}, path)
    with pytest.raises(InputError, match=r"not tensors: 'model' \(dict\), 'epoch' \(int\); it is a training"):
        FolderSource(folder)
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before 1\.6.*weights_only=True"):
        FolderSource(folder)
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(InputError, match="cut short"):
        FolderSource(folder)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds a list"):
        FolderSource(folder)


def test_a_missing_pickled_shard(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    pickled(folder, 3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(InputError, match=r"1 of 3 shards are missing: pytorch_model-00002-of-00003\.bin"):
        FolderSource(folder)


def test_what_is_read_is_what_transformers_reads(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen2")
    pickled(folder, 2)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    source = FolderSource(folder)
    assert all(torch.equal(source.read(name), expected[name]) for name in source.tensor_names())
