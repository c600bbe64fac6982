"""What the tests of kernels share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fitune.kernels.segments import Scratch

GUARD_BYTES = 1 << 20
UNTOUCHED = 0xA5


# More threads than cores once, with the best instruction set; the reruns with others have less time.
@pytest.fixture(params=[1, 2] if os.environ.get("FITUNE_INSTRUCTION_SET") else [1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class GuardedScratch:
    """Workspaces of exactly the size that was asked for, with bytes behind them that nobody may touch."""

    def __init__(self) -> None:
        self.room, self.size = torch.empty(0, dtype=torch.uint8), 0

    def of(self, size_bytes: int) -> int:
        self.check()
        self.room = torch.full((size_bytes + GUARD_BYTES,), UNTOUCHED, dtype=torch.uint8)
        self.size = size_bytes
        return self.room.data_ptr()

    def check(self) -> None:
        assert bool((self.room[self.size :] == UNTOUCHED).all()), f"written behind a workspace of {self.size} bytes"


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    guard = GuardedScratch()
    monkeypatch.setattr(Scratch, "of", lambda scratch, size_bytes: guard.of(size_bytes))
    yield
    guard.check()
