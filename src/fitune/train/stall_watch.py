"""A step that does not end: said while it lasts, by a thread beside it."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A step is called stalled after so many times the usual one, and no sooner than so many seconds.
TIMES, LEAST_SECONDS = 10.0, 60.0
KNOWN_STEPS = 32


class StallWatch:
    """Knows how long steps take; `say` gets a line for one that takes far longer, and again after twice the time."""

    def __init__(self, say: Callable[[str], None], least_seconds: float = LEAST_SECONDS) -> None:
        self._say = say
        self._least = least_seconds
        self._seconds: deque[float] = deque(maxlen=KNOWN_STEPS)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step. The first ones are not watched: nobody knows yet how long they take."""
        begun = time.perf_counter()
        if len(self._seconds) < 2:
            yield
            self._seconds.append(time.perf_counter() - begun)
            return
        usual = statistics.median(self._seconds)
        ended = threading.Event()
        thread = threading.Thread(target=self._wait, args=(number, usual, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        self._seconds.append(time.perf_counter() - begun)

    def _wait(self, number: int, usual: float, ended: threading.Event) -> None:
        limit = max(TIMES * usual, self._least)
        waited = 0.0
        while not ended.wait(limit - waited):
            waited = limit
            self._say(
                f"warning: step {number} takes {waited:.0f} s so far, usually {usual:.1f} s: the machine may be "
                "busy with something else, or swapping for want of memory, or its disk hangs"
            )
            limit *= 2
