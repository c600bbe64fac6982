"""This process's resident memory, and giving back what it does not use."""

from __future__ import annotations

import ctypes
from pathlib import Path


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def resident_bytes() -> int:
    """Resident now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most there ever was in this process."""
    return _status("VmHWM")


def give_back_free_memory() -> None:
    """Returns the C library's free heap pages to the system (glibc; elsewhere nothing happens).

    Freed tensors leave holes that new ones do not always fit; a long run's heap grows by them otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
