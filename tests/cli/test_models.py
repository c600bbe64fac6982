"""`fitune models`: what is shown of a model, and which stores are deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import call, facts_of

from fitune.models.find import find_model
from fitune.models.store import MANIFEST


def test_the_bundled_model() -> None:
    facts = facts_of("models", "show", "bundled")
    assert (facts["architecture"], facts["layers"], facts["parameters"]) == ("llama", 30, 134_515_008)
    assert facts["has_chat_template"] is True
    code, out, _ = call("models", "show", "bundled")
    assert code == 0
    assert facts["note"] in out
    assert call("models", "show", "./none")[0] == 2


def store(root: Path, name: str, reference: str, fingerprint: str) -> Path:
    folder = root / "stores" / name
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps({"reference": reference, "fingerprint": fingerprint}))
    (folder / "weights").write_bytes(bytes(1000))
    return folder


def test_only_stores_without_their_model_are_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    assert facts_of("models", "stores")["stores"] == []
    kept = {
        store(tmp_path, "a", "bundled", find_model("bundled").fingerprint()): "in use",
        store(tmp_path, "b", "some/hub-name", "0"): "unknown",
        store(tmp_path, "c", "a/relative/path.gguf", "0"): "unknown",
    }
    lost = {
        store(tmp_path, "d", str(tmp_path / "gone.gguf"), "0"): "gone",
        store(tmp_path, "e", "bundled", "of an older file"): "changed",
    }
    unfinished = store(tmp_path, "f.making-1", "bundled", "0")
    (unfinished / MANIFEST).unlink()
    lost[unfinished] = "unfinished"
    listed = facts_of("models", "stores")["stores"]
    assert {Path(entry["folder"]): entry["state"] for entry in listed} == {**kept, **lost}
    assert all(entry["bytes"] >= 1000 for entry in listed)
    assert call("models", "stores", "--all")[0] == 2
    assert sum(entry["deleted"] for entry in facts_of("models", "stores", "--prune")["stores"]) == 3
    assert set((tmp_path / "stores").iterdir()) == set(kept)
    facts_of("models", "stores", "--prune", "--all")
    assert list((tmp_path / "stores").iterdir()) == []
    shutil.rmtree(tmp_path / "stores")
