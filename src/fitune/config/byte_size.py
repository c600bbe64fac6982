"""Amounts of memory as people write them: 16GB, 7.5 GiB, 800MB."""

from __future__ import annotations

import re

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BY_NAME = {name.lower(): factor for name, factor in UNITS.items()}
_AMOUNT = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
ALLOWED = "a number with a unit, such as 16GB or 7.5GiB (1 GB is 1,000,000,000 bytes, 1 GiB 1,073,741,824)"


def parse_bytes(text: str) -> int:
    """How many bytes `text` means; upper and lower case do not matter. Raises ValueError with what is allowed."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not an amount of memory; allowed is {ALLOWED}")
    unit = found["unit"].lower()
    if not unit:
        raise ValueError(f"{text!r} has no unit; write {text.strip()}GB, or {ALLOWED}")
    if unit not in _BY_NAME:
        raise ValueError(f"{text!r} has the unit {found['unit']!r}; the units are {', '.join(UNITS)}")
    size = round(float(found["number"]) * _BY_NAME[unit])
    if size == 0:
        raise ValueError(f"{text!r} is nothing; allowed is {ALLOWED}")
    return size
