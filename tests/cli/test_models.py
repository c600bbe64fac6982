"""`fitune models`: what is shown of a model, and which stores are deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import call, facts_of

from fitune import config
from fitune.cli.models_page import as_overrides
from fitune.models.find import find_model
from fitune.models.preset_table import PRESETS
from fitune.models.store import MANIFEST, open_store
from tiny_models import BACKEND, tokenizer, write_model


def test_the_bundled_model() -> None:
    facts = facts_of("models", "show", "bundled")
    assert (facts["architecture"], facts["layers"], facts["parameters"]) == ("llama", 30, 134_515_008)
    assert facts["has_chat_template"] is True
    code, out, _ = call("models", "show", "bundled")
    assert code == 0
    assert facts["note"] in out
    assert call("models", "show", "./none")[0] == 2


def test_the_bundled_model_has_its_family_and_its_size_in_four_bits() -> None:
    facts = facts_of("models", "show", "bundled")
    assert (facts["family"], facts["is_tied"], facts["bytes_16bit"]) == ("smollm2", True, 269_030_016)
    assert 100e6 < facts["bytes_nf4"] < 120e6
    assert [row["method"] for row in facts["recommended"]] == ["qlora", "full"]


def test_a_preset(tmp_path: Path) -> None:
    facts = facts_of("models", "show", "Llama2-13B")
    assert (facts["kind"], facts["parameters"], facts["layers"]) == ("preset", 13_015_864_320, 40)
    assert (facts["heads"], facts["kv_heads"], facts["head_dim"], facts["feed_forward"]) == (40, 40, 128, 13824)
    assert (facts["context_tokens"], facts["has_chat_template"], facts["files"]) == (4096, None, [])
    code, out, err = call("models", "show", "Llama2-13B")
    assert code == 0, err
    for words in (
        "26.03 GB in 16 bits, 7.20 GB in NF4",
        "4,096 tokens",
        "lora.rank=64",
        "full   nothing that we know of",
        "https://huggingface.co/meta-llama/Llama-2-13b-hf/blob/main/config.json",
    ):
        assert words in out, out


def test_recommended_settings_can_be_given_as_they_are_shown(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    for method in ("lora", "qlora"):
        run = tmp_path / f"{method}.yaml"
        run.write_text(f"method: {method}\ndata:\n  train: train.jsonl\n")
        for row in facts_of("models", "show", "qwen2-7b")["recommended"]:
            if row["method"] == method:
                read = config.load(run, as_overrides(row["settings"]))
                assert read.lora.rank == row["settings"]["lora.rank"]
                assert read.train.betas == tuple(row["settings"].get("train.betas", (0.9, 0.999)))


def test_the_list_of_presets() -> None:
    rows = facts_of("models", "list")["presets"]
    assert [row["name"] for row in rows] == [preset.name for preset in PRESETS]
    code, out, _ = call("models", "show")
    assert code == 0
    assert out == call("models", "list")[1]
    assert "mixtral-8x7b" in out
    assert "about 7,000,000,000" in out


def test_an_unknown_name_is_told_its_neighbours() -> None:
    code, out, err = call("models", "show", "lama-2-13b")
    assert (code, out) == (2, "")
    assert "presets of a similar name: llama-2-13b" in err


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


def test_every_byte_of_a_store_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    whole, other = (
        open_store(find_model(str(write_model(tmp_path / n, n))), BACKEND).folder for n in ("llama", "qwen3")
    )
    assert all(entry["problems"] == [] for entry in facts_of("models", "stores", "--verify")["stores"])
    assert all(entry["problems"] is None for entry in facts_of("models", "stores")["stores"])
    path = next(other.glob("model-00001*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert {entry["state"] for entry in facts_of("models", "stores")["stores"]} == {"in use"}
    code, out, err = call("models", "stores", "--verify")
    assert code == 1, err
    assert f"{path.name} is not what was written" in out
    assert f"{whole}: as it was written" in out
    code, out, err = call("models", "stores", "--verify", "--prune", "--json")
    assert code == 1, err
    states = {Path(entry["folder"]): (entry["state"], entry["deleted"]) for entry in json.loads(out)["stores"]}
    assert states == {whole: ("in use", False), other: ("damaged", True)}
    assert whole.is_dir()
    assert not other.exists()


def test_a_tokenizer_that_nearly_fits_is_warned_of_and_one_that_does_not_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vocab_size=259)
    odd = tokenizer()
    odd.add_tokens(["<picture>"])
    odd.save_pretrained(folder)
    (warning,) = facts_of("models", "show", folder)["warnings"]
    assert "'<picture>' (id 259) without a row" in warning
    code, _, err = call("models", "show", folder)
    assert (code, err) == (0, f"warning: {warning}\n")
    odd.pad_token = "<picture>"
    odd.save_pretrained(folder)
    code, out, err = call("models", "show", folder)
    assert (code, out) == (2, "")
    assert "were added to the tokenizer, not to the model" in err
    for path in (*folder.glob("tokenizer*"), *folder.glob("*.jinja")):
        path.unlink()
    assert "the tokenizer is missing" in call("models", "show", folder)[2]
