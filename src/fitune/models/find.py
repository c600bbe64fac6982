"""From the words that name a model to its source."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fitune.errors import InputError

if TYPE_CHECKING:
    from fitune.models.source import Kind, ModelSource

ALLOWED = "a folder with safetensors, a .gguf file, a hub name (owner/name) or the word bundled"


def find_model(reference: str) -> ModelSource:
    """A folder, a `.gguf` file, `bundled` or a hub name -> its source. Raises InputError for anything else.

    What exists on disk wins over the hub. Nothing is fetched unless a hub name is not in the local cache. Of a
    multimodal model it is the source of the text decoder.
    """
    # Inside: each kind loads torch or transformers, which a mere `import fitune.models` should not.
    from fitune.models import bundled, hub

    words = reference.strip()
    if not words:
        raise InputError(f"the model's name is empty; give {ALLOWED}")
    if words == bundled.REFERENCE:
        return bundled.open_bundled()
    path = Path(words).expanduser()
    if path.is_dir():
        return _open_folder(path, reference, "folder")
    if path.is_file():
        return _open_file(path, reference)
    if not _looks_like_path(words) and hub.HUB_NAME.fullmatch(words):
        return _open_folder(hub.snapshot(words), words, "hub")
    raise InputError(_not_found(words, path), where=f"model {reference!r}")


def _open_folder(folder: Path, reference: str, kind: Kind) -> ModelSource:
    from fitune.models.folder import FolderSource
    from fitune.models.foreign import foreign_source
    from fitune.models.text_part import text_part

    return foreign_source(folder, reference, kind) or text_part(FolderSource(folder, reference, kind))


def _open_file(path: Path, reference: str) -> ModelSource:
    if path.suffix.lower() == ".gguf":
        from fitune.models.gguf_file import GGUFSource

        return GGUFSource(path, reference=reference)
    if path.suffix == ".safetensors":
        raise InputError(f"a single weights file; give its folder: {path.parent}", where=path)
    raise InputError(f"a file, but not a .gguf; give {ALLOWED}", where=path)


def _looks_like_path(words: str) -> bool:
    starts = ("/", "./", "../", "~", f".{os.sep}")
    return words.startswith(starts) or words.lower().endswith((".gguf", ".safetensors")) or words.endswith("/")


def _not_found(words: str, path: Path) -> str:
    from fitune.models.presets import find_preset

    preset = find_preset(words)
    if preset is not None:
        return (
            "a preset's name: dimensions to plan with, no weights; to train give a folder, a .gguf file or a "
            f"hub name, e.g. {preset.hub[0]}"
        )
    near = _near_misses(words, path)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"no such file or folder{hint} Allowed: {ALLOWED}" if near else f"no such file or folder; give {ALLOWED}"


def _near_misses(words: str, path: Path) -> list[str]:
    """Names beside the missing one that resemble it, and `bundled` where that was nearly written."""
    found = difflib.get_close_matches(words.lower(), ["bundled"], n=1, cutoff=0.6)
    try:
        beside = [item.name for item in path.parent.iterdir() if item.is_dir() or item.suffix == ".gguf"]
    except OSError:
        return found
    return found + [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside, n=2)]
