"""This process's resident memory: how it is taken, and giving back what is not used."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# oneDNN keeps the machine code of the last 1024 products, about 0.1 MB for each shape it has seen; a run sees new
# shapes all the time (docs/log.md: 0.4 GB). A training step has some 60 shapes of its own.
PRIMITIVES_KEPT = 128


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


def ask_for_huge_pages() -> None:
    """Has torch take tensors of 2 MB and more on pages of that size, unless the environment says otherwise.

    Linux then maps 2 MB at a time instead of 4 KB, and the heap has fewer holes (docs/log.md: 3 to 5 % of a step and
    of the peak). To be called before torch makes its first tensor: it reads the variable once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def bound_primitive_cache() -> None:
    """Holds oneDNN's cache of compiled products to `PRIMITIVES_KEPT`, unless the environment says otherwise.

    To be called before the first product: oneDNN reads it once.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES_KEPT))
