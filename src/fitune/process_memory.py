"""This process's resident memory."""

from __future__ import annotations

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
