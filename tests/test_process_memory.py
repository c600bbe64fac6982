from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Products of many shapes, as prompts of many lengths bring them; prints by how much the heap grew.
MANY_SHAPES = """
import sys, torch
from fitune.process_memory import bound_primitive_cache, give_back_free_memory, resident_bytes
if sys.argv[1] == "bounded":
    bound_primitive_cache()
torch.set_num_threads(1)
weight = torch.ones(256, 256, dtype=torch.bfloat16)
def multiply(rows):
    torch.mm(torch.ones(rows, 256, dtype=torch.bfloat16), weight)
multiply(1000)
give_back_free_memory()
before = resident_bytes()
for rows in range(1, 901):
    multiply(rows)
give_back_free_memory()
print(resident_bytes() - before)
"""


def growth_bytes(mode: str) -> int:
    # A run in this very process has set the bound for its children.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
    found = subprocess.run(
        [sys.executable, "-c", MANY_SHAPES, mode], env=environment, capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    return int(found.stdout)


def test_compiled_products_do_not_pile_up() -> None:
    unbounded = growth_bytes("unbounded")
    if unbounded < 20_000_000:
        pytest.skip(f"torch compiles no bfloat16 products on this processor ({unbounded} bytes more)")
    # What is compiled stays either way (0.28 MB a shape); what surrounds it is bounded.
    assert growth_bytes("bounded") < 0.7 * unbounded
