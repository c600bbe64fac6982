"""Those that this machine can run, and a folder's tests again in another of them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from fitune.kernels import native


def available_sets() -> list[str]:
    if not native.status().available:
        return []
    library = ctypes.CDLL(native.status().path)
    library.fitune_available.restype = ctypes.c_char_p
    return library.fitune_available().decode().split()


def assert_passes_with(name: str, deselected: list[str], *files: str) -> None:
    """The tests of these files, but those whose names have such a part, in a process that is told to use that set."""
    chosen = " and ".join(f"not {part}" for part in ["instruction_set", *deselected])
    paths = [str(Path(__file__).parent / file) for file in files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *paths],
        env={**os.environ, "FITUNE_INSTRUCTION_SET": name, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
