"""When a run is warned of memory that runs short, and when it stops; a real run is in test_run.py."""

from __future__ import annotations

import pytest

from fitune.train.memory_watch import MemoryWatch, Present, present

GB = 10**9


def looked(*available: float, peak: float = 2.0, resident: float = 1.0, total: float = 20.0) -> list[str]:
    """What a watch says of one moment after the other, in GB."""
    moments = iter([Present(int(total * GB), int(a * GB), int(peak * GB), int(resident * GB)) for a in available])
    watch = MemoryWatch(lambda: next(moments))
    found = [watch.look() for _ in available]
    return ["" if short is None else "stop" if short.must_stop else "warn" for short in found]


def test_enough_is_not_spoken_of() -> None:
    assert looked(10, 5, 1.7) == ["", "", ""]


def test_it_warns_once_until_there_is_enough_again() -> None:
    assert looked(1.5, 1.5, 1.4, 5, 1.5) == ["warn", "", "", "", "warn"]


def test_it_stops_where_the_next_peak_would_not_fit() -> None:
    assert looked(1.5, 1.1) == ["warn", "stop"]
    assert looked(0.5) == ["stop"]


def test_small_machines_are_measured_by_their_own_size() -> None:
    assert looked(1.1, total=2.0) == ["warn"]
    assert looked(1.15, total=2.0) == [""]
    assert looked(1.03, total=2.0) == ["stop"]


def test_what_is_not_known_is_not_judged() -> None:
    assert looked(0, total=0) == [""]


@pytest.mark.parametrize(
    ("available", "words"), [(1.1, "100 MB of 20.0 GB would be left"), (0.5, "500 MB of 20.0 GB")]
)
def test_the_sentence_says_how_much(available: float, words: str) -> None:
    short = MemoryWatch(lambda: Present(20 * GB, int(available * GB), 2 * GB, GB)).look()
    assert short is not None
    assert words in str(short)


def test_this_machine_is_measured() -> None:
    now = present()
    assert now.total >= now.available > 0
    assert now.peak >= now.resident > 0
