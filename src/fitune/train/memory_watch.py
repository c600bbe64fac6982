"""Memory that others take while a run goes on: a warning, and a stop before the kernel kills somebody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fitune.hardware import memory
from fitune.process_memory import peak_bytes, resident_bytes

# A run is warned when less would be left at a step's peak than the first of these, and stopped under the second:
# shares of the machine's memory, or bytes where those are less.
WARN_SHARE, WARN_BYTES = 0.06, 600_000_000
STOP_SHARE, STOP_BYTES = 0.02, 200_000_000


@dataclass(frozen=True)
class Short:
    """How short memory is.

    Attributes:
        left_bytes: what would be free at the process's next peak; below 0: so much is missing.
        total_bytes: of the machine, or the container.
    """

    left_bytes: int
    total_bytes: int
    must_stop: bool

    def __str__(self) -> str:
        here = f"of {self.total_bytes / 1e9:.1f} GB"
        if self.left_bytes < 0:
            return f"memory runs short: {-self.left_bytes / 1e6:,.0f} MB {here} are missing for the next step"
        return f"memory runs short: {self.left_bytes / 1e6:,.0f} MB {here} would be left in the next step"


@dataclass(frozen=True)
class Present:
    """Bytes: of the machine, free in it without swapping, and this process's peak and what it holds now."""

    total: int
    available: int
    peak: int
    resident: int


def present() -> Present:
    """What is now."""
    return Present(*memory(), peak_bytes(), resident_bytes())


class MemoryWatch:
    """Looks between steps, when the process holds less than at its peak, which it will come to again.

    Args:
        budget_bytes: what the run was asked to stay within; None: nothing was asked.
    """

    def __init__(self, measure: Callable[[], Present] | None = None, budget_bytes: int | None = None) -> None:
        self._measure = measure or present
        self._warned = False
        self._budget_bytes = budget_bytes

    def over_budget(self) -> str | None:
        """A sentence where the run took more than it was asked to, once."""
        budget = self._budget_bytes
        if budget is None or (peak := self._measure().peak) <= budget:
            return None
        self._budget_bytes = None
        return f"the run took {peak / 1e9:.2f} GB, {(peak - budget) / 1e6:,.0f} MB more than its budget"

    def look(self) -> Short | None:
        """None while there is enough, and where it was warned already; a warning comes again after a recovery."""
        now = self._measure()
        left = now.available - (now.peak - now.resident)
        stop, warn = min(STOP_SHARE * now.total, STOP_BYTES), min(WARN_SHARE * now.total, WARN_BYTES)
        if now.total == 0 or left >= warn:
            self._warned = False
            return None
        if left >= stop and self._warned:
            return None
        self._warned = True
        return Short(left, now.total, must_stop=left < stop)
