"""Lengths in, rows out: which documents share a row, so that rows are as full as can be."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Document lengths -> rows of document indices; no row holds more than `row_tokens` tokens.

    Best fit decreasing: the longest document first, each into the row it fills best (Johnson 1974: at most
    11/9 of the fewest rows). The same lengths give the same rows.

    Raises:
        ValueError: a document is longer than a row, or has no tokens.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= row_tokens:
            raise ValueError(f"document {index} has {length} tokens; a row holds 1 to {row_tokens}")
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(free, (lengths[index], -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > lengths[index]:
            insort(free, (left - lengths[index], row))
    return rows


def fill_share(lengths: Sequence[int], rows: Sequence[Sequence[int]], row_tokens: int) -> float:
    """Which share of the rows' room holds documents, 0 to 1."""
    return sum(lengths[index] for row in rows for index in row) / (len(rows) * row_tokens) if rows else 0.0
