"""What users say of machines: cards by name, sizes, counts, and every way to get it wrong."""

from __future__ import annotations

import pytest

from fitune.errors import InputError
from fitune.plan.machine_table import CARDS
from fitune.plan.machines import find_machine


@pytest.mark.parametrize(
    ("said", "name", "mebibytes"),
    [
        ("rtx3090", "rtx3090", 24576),
        ("3090", "rtx3090", 24576),
        ("RTX 3090", "rtx3090", 24576),
        ("NVIDIA GeForce RTX 3090", "rtx3090", 24576),
        ("rtx3090-24gb", "rtx3090", 24576),
        ("4060ti-16gb", "rtx4060ti-16gb", 16380),
        ("rtx 4060 Ti 16GB", "rtx4060ti-16gb", 16380),
        ("3080", "rtx3080", 10240),
        ("3080-12gb", "rtx3080-12gb", 12288),
        ("A100-80GB", "a100-80gb", 81920),
        ("a100 40", "a100-40gb", 40960),
        ("Tesla T4", "t4", 15360),
        ("h100-80gb", "h100", 81559),
        ("AMD Instinct MI300X", "mi300x", 196592),
        ("rtx a6000", "a6000", 49140),
    ],
)
def test_a_card_by_any_of_its_names(said: str, name: str, mebibytes: int) -> None:
    found = find_machine(said, None, 2)
    assert (found.name, found.kind, found.memory_bytes, found.count) == (name, "gpu", mebibytes * 2**20, 2)
    assert found.source.startswith("https://")


def test_sizes_instead_of_names() -> None:
    gpu = find_machine(None, "24GB", 3)
    assert (gpu.kind, gpu.memory_bytes, gpu.count, gpu.source) == ("gpu", 24 * 10**9, 3, "you")
    assert find_machine(None, "23.99 GiB", 1).memory_bytes == round(23.99 * 2**30)
    cpu = find_machine("cpu:64GB", None, 1)
    assert (cpu.kind, cpu.memory_bytes, cpu.count) == ("cpu", 64 * 10**9, 1)
    assert find_machine("CPU: 7.5GiB", None, 1).memory_bytes == round(7.5 * 2**30)


@pytest.mark.parametrize(
    ("on", "memory", "count", "where", "words"),
    [
        (None, "24", 1, "--memory", "has no unit; write 24GB"),
        (None, "lots", 1, "--memory", "is not an amount of memory"),
        (None, "-3GB", 1, "--memory", "is not an amount of memory"),
        (None, "0GB", 1, "--memory", "is nothing"),
        (None, "24GX", 1, "--memory", "the units are KB, MB, GB"),
        ("cpu:64", None, 1, "--on", "has no unit"),
        ("cpu:", None, 1, "--on", "is not an amount of memory"),
        ("cpu", None, 1, "--on", "write cpu:SIZE"),
        ("cpu:64GB", None, 2, "--count", "is for GPUs"),
        ("gpu:24GB", None, 1, "--on", "a GPU by its size is --memory"),
        ("rtx3091", None, 1, "--on", "did you mean rtx3090"),
        ("abacus", None, 1, "--on", "Known are rtx2080ti"),
        ("", None, 1, "--on", "no card called ''"),
        ("a100", None, 1, "--on", "several sizes of memory: a100-40gb, a100-80gb"),
        ("4060ti", None, 1, "--on", "rtx4060ti-8gb, rtx4060ti-16gb"),
        ("rtx3090-48gb", None, 1, "--on", "has 24,576 MiB, not 48 GB"),
        ("rtx3090", "24GB", 1, "--memory", "keep one"),
        ("rtx3090", None, 0, "--count", "0 devices"),
        ("rtx3090", None, -1, "--count", "from 1 to 1024"),
        (None, None, 3, "--count", "add --on CARD or --memory SIZE"),
    ],
)
def test_what_is_wrong_is_said(on: str | None, memory: str | None, count: int, where: str, words: str) -> None:
    with pytest.raises(InputError) as raised:
        find_machine(on, memory, count)
    assert raised.value.where == where
    assert words in str(raised.value)


def test_every_card_is_found_by_its_own_name() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert find_machine(card.name, None, 1).memory_bytes == card.mebibytes * 2**20
        assert card.source.startswith("https://")
        assert find_machine(card.name, None, 1).computes_bfloat16 == card.computes_bfloat16
    # Turing and Volta have no units for bfloat16 (compute capability below 8.0).
    narrow = {card.name for card in CARDS if not card.computes_bfloat16}
    assert narrow == {"rtx2080ti", "t4", "v100-16gb", "v100-32gb"}
