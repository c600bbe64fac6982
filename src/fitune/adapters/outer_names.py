"""An adapter of a text decoder under the names that the whole, multimodal model gives its modules; and back.

Training builds the decoder alone (`model.layers.0...`). PEFT and servers load the whole model, in which the same
module is `model.language_model.layers.0...`, and an adapter under other names has no place in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# A module's name in one model -> its name in the other.
Rename = Callable[[str], str]
_PEFT = "base_model.model."


def renamed_key(key: str, rename: Rename) -> str:
    """A tensor's name in an adapter's file, its module renamed."""
    return _PEFT + rename(key.removeprefix(_PEFT)) if key.startswith(_PEFT) else key


def renamed_targets(config: dict[str, Any], rename: Rename) -> dict[str, Any]:
    """adapter_config.json with the listed modules renamed, those of rank and alpha patterns too; ends of names stay,
    and expressions."""
    lists = {
        field: sorted(rename(name) for name in config[field])
        for field in ("target_modules", "exclude_modules", "modules_to_save")
        if isinstance(config.get(field), (list, tuple, set))
    }
    patterns = {
        field: {rename(key): value for key, value in config[field].items()}
        for field in ("rank_pattern", "alpha_pattern")
        if isinstance(config.get(field), dict)
    }
    return {**config, **lists, **patterns}


@contextmanager
def under_graph_names(folder: Path, rename: Rename | None) -> Iterator[Path]:
    """The adapter's folder; where `rename` changes names in it, a copy with those names, for as long as it is used.

    A folder that cannot be read is given as it is: who reads it then says what is wrong.
    """
    if rename is None:
        yield folder
        return
    try:
        config, before = _read(folder)
    except (OSError, ValueError, SafetensorError):
        config, before = {}, {}
    tensors = {renamed_key(key, rename): value for key, value in before.items()}
    if tensors.keys() == before.keys():
        yield folder
        return
    with TemporaryDirectory(prefix="fitune-adapter-") as name:
        save_file(tensors, Path(name) / "adapter_model.safetensors", metadata={"format": "pt"})
        (Path(name) / "adapter_config.json").write_text(json.dumps(renamed_targets(config, rename)))
        yield Path(name)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
