"""Which folders are converted while they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_originals import BAICHUAN, CHATGLM, draw_baichuan, draw_chatglm, train_vocabulary, write_folder

from fitune.errors import InputError
from fitune.models.find import find_model
from fitune.models.foreign import foreign_source


def test_the_two_families_are_found_by_their_model_type(tmp_path: Path) -> None:
    vocabulary = train_vocabulary(tmp_path / "vocabulary")
    glm = write_folder(tmp_path / "glm", CHATGLM, draw_chatglm(CHATGLM), vocabulary)
    baichuan = write_folder(tmp_path / "baichuan", BAICHUAN, draw_baichuan(BAICHUAN), vocabulary)
    for folder, model_type in ((glm, "glm"), (baichuan, "llama")):
        found = foreign_source(folder, "owner/name", "hub")
        assert found is not None
        assert (found.kind, found.reference, found.config.model_type) == ("hub", "owner/name", model_type)
        assert {path.name for path in found.files()} == {"config.json", "model.safetensors", "tokenizer.model"}
        assert found.fingerprint() != find_model(str(folder)).fingerprint()


@pytest.mark.parametrize("written", ['{"model_type": "llama"}', "[]", "no JSON", None])
def test_every_other_folder_is_left_to_transformers(tmp_path: Path, written: str | None) -> None:
    if written is not None:
        (tmp_path / "config.json").write_text(written)
    assert foreign_source(tmp_path) is None
    with pytest.raises(InputError):
        find_model(str(tmp_path))


def test_a_folder_without_weights_or_with_torn_ones_is_refused(tmp_path: Path) -> None:
    vocabulary = train_vocabulary(tmp_path / "vocabulary")
    folder = write_folder(tmp_path / "glm", CHATGLM, draw_chatglm(CHATGLM), vocabulary)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut short or damaged"):
        find_model(str(folder))
    weights.unlink()
    with pytest.raises(InputError, match="no weights"):
        find_model(str(folder))
    index = {"weight_map": {"transformer.output_layer.weight": "a.safetensors", "other": "a.safetensors"}}
    (folder / "a.safetensors").write_bytes(whole)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"no file holds \(first: other\)"):
        find_model(str(folder))
