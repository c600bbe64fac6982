"""The store: made once, whole or not at all, found without reading weights, and read by transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fitune.errors import DiskFullError, FituneError, InputError
from fitune.models.build import build_dense, build_quantised
from fitune.models.find import find_model
from fitune.models.folder import FolderSource
from fitune.models.store import MANIFEST, open_store
from fitune.quant.linear import QuantisedLinear
from tiny_models import BACKEND, FAMILIES, distance, write_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    before = os.environ.get("FITUNE_CACHE")
    os.environ["FITUNE_CACHE"] = str(tmp_path / "cache")
    yield tmp_path / "cache"
    del os.environ["FITUNE_CACHE"]
    if before is not None:
        os.environ["FITUNE_CACHE"] = before


class CountingSource(FolderSource):
    """Counts what is read of it."""

    reads = 0

    def read(self, name: str) -> torch.Tensor:
        self.reads += 1
        return super().read(name)


def test_made_once_and_found_without_reading_weights(tmp_path: Path, cache: Path) -> None:
    source = CountingSource(write_model(tmp_path / "model"), reference="tiny")
    seen: list[tuple[int, int]] = []
    store = open_store(source, BACKEND, lambda done, total: seen.append((done, total)))
    assert source.reads == len(source.tensor_names())
    assert seen == [(number + 1, source.reads) for number in range(source.reads)]
    again = CountingSource(tmp_path / "model", reference="tiny")
    assert open_store(again, BACKEND).folder == store.folder
    assert again.reads == 0
    assert sorted(store.quantised + store.plain) == sorted(source.tensor_names())
    assert len(store.quantised) == 14
    assert "lm_head.weight" in store.plain
    left = {path.suffix for path in (cache / "stores").iterdir()}
    assert left == {"", ".lock"}
    # another model, and the same one changed, have stores of their own
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    assert open_store(CountingSource(tmp_path / "model", reference="tiny"), BACKEND).folder != store.folder


@pytest.mark.skipif(BACKEND != "native", reason="one backend only")
def test_both_backends_write_the_same_files(tmp_path: Path) -> None:
    source = find_model(str(write_model(tmp_path / "model")))
    digests = []
    for backend in ("native", "reference"):
        os.environ["FITUNE_CACHE"] = str(tmp_path / backend)
        digests.append(open_store(source, backend).manifest["files"])
    assert digests[0] == digests[1]


MAKING = """
import sys, os, signal
from fitune.models.find import find_model
from fitune.models.store import open_store
def progress(done, total):
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
print(open_store(find_model(sys.argv[1]), "reference", progress).folder)
"""


def test_two_processes_at_once_end_with_one_whole_store(tmp_path: Path, cache: Path) -> None:
    model = str(write_model(tmp_path / "model"))
    both = [
        subprocess.Popen([sys.executable, "-c", MAKING, model, "-1"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(folders) == 1
    assert [path.name for path in (cache / "stores").iterdir() if path.is_dir()] == [Path(folders.pop()).name]
    assert open_store(find_model(model), BACKEND).quantised


@pytest.mark.parametrize("when", [1, 12])
def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path: Path, cache: Path, when: int) -> None:
    model = str(write_model(tmp_path / "model"))
    done = subprocess.run([sys.executable, "-c", MAKING, model, str(when)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not list((cache / "stores").glob(f"*/{MANIFEST}"))
    assert not [path for path in (cache / "stores").iterdir() if path.is_dir() and not path.name.startswith(".")]
    store = open_store(find_model(model), BACKEND)
    # what the dead process left is gone too
    assert [path for path in (cache / "stores").iterdir() if path.is_dir()] == [store.folder]


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    source = find_model(str(write_model(tmp_path / "model")))
    folder = open_store(source, BACKEND).folder
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(FituneError, match=r"model-00002-of-00003.safetensors has \d+ bytes.*delete the folder"):
        open_store(source, BACKEND)
    file.unlink()
    with pytest.raises(FituneError, match=r"is missing"):
        open_store(source, BACKEND)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_told_beforehand(tmp_path: Path, small_disk: Path) -> None:
    source = CountingSource(write_model(tmp_path / "model", intermediate_size=2048), reference="tiny")
    os.environ["FITUNE_CACHE"] = str(small_disk)
    with pytest.raises(DiskFullError, match=r"takes .* GB and .* GB free"):
        open_store(source, BACKEND)
    assert source.reads == 0


def test_a_disk_that_runs_full_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    source = find_model(str(write_model(tmp_path / "model")))
    os.environ["FITUNE_CACHE"] = str(small_disk)

    def fill(done: int, total: int) -> None:
        if done == total:
            room = os.statvfs(small_disk)
            (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize))

    with pytest.raises(DiskFullError, match=r"ran full while .* was written; nothing was kept"):
        open_store(source, BACKEND, fill)
    assert not [path for path in (small_disk / "stores").iterdir() if path.is_dir()]
    (small_disk / "filler").unlink()
    open_store(source, BACKEND)


def test_all_that_is_wrong_with_a_checkpoint_is_told_together(tmp_path: Path, cache: Path) -> None:
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.norm.weight")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:, :-1].contiguous()
    tensors["model.layers.7.unknown.weight"] = gone
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for build in (build_quantised, lambda *rest: build_dense(*rest[:2], trainable=False)):
        with pytest.raises(InputError) as caught:
            build(find_model(str(folder)), torch.float32, BACKEND)
        text = str(caught.value)
        assert "3 problems" in text
        assert "model.norm.weight is missing" in text
        assert "model.layers.7.unknown.weight is not part of this architecture" in text
        assert "model.layers.1.mlp.up_proj.weight has shape (128, 63), the configuration wants (128, 64)" in text
    assert not list(cache.glob("stores/*/"))


def test_values_that_are_not_finite_are_told_together(tmp_path: Path, cache: Path) -> None:
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        open_store(find_model(str(folder)), BACKEND)
    assert "2 problems" in str(caught.value)
    assert not list(cache.glob("stores/*/"))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # in training mode: bitsandbytes repacks its weights in an evaluation pass
        return model.train()(input_ids=tokens, use_cache=False).logits.float()


def check_loads(reference: str) -> None:
    source = find_model(reference)
    ours = build_quantised(source, torch.bfloat16, BACKEND)
    folder = open_store(source, BACKEND).folder
    theirs, problems = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(problems.values()), problems
    kinds = {type(module).__name__ for module in theirs.modules()}
    assert "Linear4bit" in kinds
    assert distance(logits_of(ours), logits_of(theirs)) < 2e-2
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_and_bitsandbytes_load_it(tmp_path: Path, family: str) -> None:
    check_loads(str(write_model(tmp_path / "model", family)))


@pytest.mark.slow
def test_transformers_and_bitsandbytes_load_the_bundled_models(tmp_path: Path) -> None:
    check_loads("bundled")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_model_of_a_store_computes_with_its_decoded_weights(tmp_path: Path, family: str) -> None:
    """Against transformers' own model holding the decoded weights as ordinary ones."""
    folder = write_model(tmp_path / "model", family, torch.float32)
    source = find_model(str(folder))
    ours = build_quantised(source, torch.float32, BACKEND)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    for name, module in ours.named_modules():
        if isinstance(module, QuantisedLinear):
            plain.get_submodule(name).weight.data = module.nf4().dense(torch.float32, BACKEND)
    for name, parameter in ours.named_parameters():
        if parameter.dim() == 1 and "absmax" not in name:  # vectors keep their 32 bits in the store
            plain.get_parameter(name).data = parameter.data.clone()
    assert distance(logits_of(ours), logits_of(plain)) < 1e-5
