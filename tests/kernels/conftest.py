"""What the tests of kernels share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


# More threads than cores once, with the best instruction set; the reruns with others have less time.
@pytest.fixture(params=[1, 2] if os.environ.get("FITUNE_INSTRUCTION_SET") else [1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
