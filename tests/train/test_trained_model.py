"""What a name means: a run, an adapter, a model, or nothing that can be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fitune.errors import InputError
from fitune.train.run_folder import RunFolder
from fitune.train.trained_model import find_trained, read_run_config


def run_folder(path: Path, method: str = "qlora") -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(
        f"model: bundled\nmethod: {method}\ndata:\n  train: /gone/data.jsonl\n  system: Be brief.\n"
        "train:\n  learning_rate: 1.0e-05\n  threads: 1\n"
    )
    return path


def adapter(path: Path, **fields: object) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


def test_a_run_is_found_although_its_data_is_gone(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    adapter(run / "adapter")
    found = find_trained(str(run))
    assert (found.adapter, found.method, found.computation.threads) == (run / "adapter", "qlora", 1)
    assert found.config is not None
    assert found.config.data.system == "Be brief."
    assert found.source.reference == "bundled"
    assert find_trained(str(run), four_bit=False).method == "lora"


def test_an_adapter_says_what_its_base_is(tmp_path: Path) -> None:
    ours = adapter(tmp_path / "ours", base_model_name_or_path="./not-there")
    (ours / "base.json").write_text(json.dumps({"reference": "bundled", "identity": "x"}))
    assert find_trained(str(ours)).source.reference == "bundled"
    assert find_trained(str(ours)).method == "lora"
    other = adapter(tmp_path / "other", base_model_name_or_path="bundled")
    assert find_trained(str(other), four_bit=True).method == "qlora"
    with pytest.raises(InputError, match="does not say which base"):
        find_trained(str(adapter(tmp_path / "nameless")))


def test_a_model_is_nobody_s_run() -> None:
    found = find_trained("bundled")
    assert (found.adapter, found.untuned, found.run, found.method) == (None, None, None, "lora")


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no run"):
        find_trained(str(tmp_path / "empty"))
    run = run_folder(tmp_path / "run")
    with pytest.raises(InputError, match="has to be trained anew"):
        find_trained(str(run))
    (run / "checkpoints" / "step-000003").mkdir(parents=True)
    with pytest.raises(InputError, match="--resume"):
        find_trained(str(run))
    (run / "config.yaml").write_text("model: [")
    with pytest.raises(InputError, match="is not the run file of a run"):
        read_run_config(RunFolder(run))
    (run / "config.yaml").write_text("method: magic\ndata: {train: [x]}")
    with pytest.raises(InputError, match="is not the run file of a run"):
        read_run_config(RunFolder(run))
