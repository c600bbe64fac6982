"""Models by reference: a folder, a hub name, a GGUF file, the bundled one. Importing this loads no torch."""

from __future__ import annotations

from fitune.models.find import find_model
from fitune.models.source import ModelSource

__all__ = ["ModelSource", "find_model"]
