from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fitune.cli import main
from fitune.process_memory import ask_for_huge_pages

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


# Prints the bytes on huge pages after a tensor of 160 MB, as the command makes them or as torch does by itself.
HUGE_PAGES = """
import sys
from fitune.process_memory import ask_for_huge_pages
if sys.argv[1] == "asked":
    ask_for_huge_pages()
import fitune.train.prepare, torch
tensor = torch.ones(40_000_000)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages")))
"""


def huge_bytes(mode: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    found = subprocess.run(
        [sys.executable, "-c", HUGE_PAGES, mode], env=environment, capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    return int(found.stdout)


def test_tensors_lie_on_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[madvise]" not in setting.read_text():
        pytest.skip("this system does not let programs choose huge pages")
    assert huge_bytes("unasked") < 40_000_000
    assert huge_bytes("asked") > 100_000_000


def test_the_command_asks_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ.pop("THP_MEM_ALLOC_ENABLE") == "1"


def test_a_choice_made_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    ask_for_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
