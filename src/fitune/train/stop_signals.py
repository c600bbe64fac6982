"""SIGINT and SIGTERM while a run trains: they are noted, and what was begun ends whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them, so that a step ends whole. A second one is not held."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for held in (signal.SIGINT, signal.SIGTERM):
        try:
            before[held] = signal.signal(held, note)
        except ValueError:  # not the main thread: whoever runs us handles signals
            continue
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
