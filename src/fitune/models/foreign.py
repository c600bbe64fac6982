"""Folders of architectures that transformers does not carry but that are converted while they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fitune.models.source import Kind, ModelSource


def foreign_source(folder: Path, reference: str | None = None, kind: Kind = "folder") -> ModelSource | None:
    """The source of a ChatGLM or Baichuan folder; None for every other folder, which transformers may know.

    Decided by `model_type` in config.json. Raises InputError for a folder of these families that cannot be used.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # FolderSource says what is wrong with it
    model_type = found.get("model_type") if isinstance(found, dict) else None
    if model_type == "chatglm":
        from fitune.models.chatglm import ChatGLMSource

        return ChatGLMSource(folder, reference, kind)
    if model_type == "baichuan":
        from fitune.models.baichuan import BaichuanSource

        return BaichuanSource(folder, reference, kind)
    return None
