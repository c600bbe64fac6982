"""How far the data are on their way to tokens: large files take minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fitune.data.encoded_file import Watch

# Where there is no terminal to write on one line of, a line so often.
LINE_SECONDS = 60.0


@contextmanager
def encoding() -> Iterator[Watch]:
    """Something to tell of every chunk: (what is done, samples so far); shown on standard error."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    told = begun = time.perf_counter()
    before: tuple[str, int] = ("", 0)  # what was done at `begun`, and its samples then
    shown = False

    def watch(what: str, samples: int) -> None:
        nonlocal told, begun, before, shown
        now = time.perf_counter()
        if what != before[0]:
            begun, before = now, (what, samples)
        words = f"{what}: {samples:,} samples"
        if samples > before[1]:
            words += f", {(samples - before[1]) / max(1e-9, now - begun):,.0f} a second"
        if console.is_terminal and now - told > 0.2:
            line = Text(words)
            line.truncate(console.width - 1, overflow="ellipsis")
            sys.stderr.write(f"\r\x1b[K{line.plain}")
            sys.stderr.flush()
            told, shown = now, True
        elif not console.is_terminal and now - told > LINE_SECONDS:
            print(words, file=sys.stderr, flush=True)
            told = now

    try:
        yield watch
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
