"""Facts on the screen: as aligned lines, as a table, or as one line of JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any


def _plain(value: Any) -> Any:
    """What JSON has: sets sorted, paths as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path | datetime) else value


def print_json(facts: Mapping[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(_plain(facts), ensure_ascii=False, allow_nan=False), flush=True)


def print_warnings(sentences: Iterable[str]) -> None:
    """One line each on stderr, where they are seen beside --json too."""
    for sentence in sentences:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def gigabytes(count_bytes: float) -> str:
    """`1.90 GB` (1e9 bytes)."""
    return f"{count_bytes / 1e9:.2f} GB"


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """A heading and aligned lines of name and value."""
    width = max(map(len, facts), default=0)
    print(title)
    for name, value in facts.items():
        print(f"  {name:<{width}}  {value}".rstrip())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under column heads; columns are as wide as their widest entry, the last one is not padded."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(f"{entry:<{width}}" for entry, width in zip(line, widths, strict=True)).rstrip())
