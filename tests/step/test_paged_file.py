"""The mapped file: what is written stays when its memory is given back, and nothing is left behind."""

from __future__ import annotations

import mmap
import resource
from pathlib import Path

import pytest
import torch

from fitune.errors import DiskFullError
from fitune.step.paged_file import PagedFile, in_memory_order, place_bytes

COUNT = 1 << 20  # of float32: 4 MiB


def resident_file_bytes() -> int:
    """Of this process: pages of mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def filled(folder: Path) -> tuple[PagedFile, torch.Tensor, torch.Tensor]:
    file = PagedFile(folder, 2 * place_bytes((COUNT,), torch.float32))
    first, second = (file.zeros((COUNT,), dtype=torch.float32) for _ in range(2))
    first.copy_(torch.arange(COUNT))
    second.fill_(7)
    return file, first, second


def test_values_stay_when_their_memory_is_given_back(tmp_path: Path) -> None:
    file, first, second = filled(tmp_path)
    before = resident_file_bytes()
    for part in (first[: COUNT // 2], first[COUNT // 2 :], second):
        file.give_back(part)
    assert resident_file_bytes() <= before - 0.9 * 8 * COUNT
    assert torch.equal(first, torch.arange(COUNT).float())
    assert torch.equal(second, torch.full((COUNT,), 7.0))
    second[5] = 8
    file.give_back(first[5:6])  # a page that is shared with values that were just written
    file.give_back(second[5:6])
    assert second[4:7].tolist() == [7, 8, 7]


def test_with_a_private_map_they_would_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MAP_SHARED", mmap.MAP_PRIVATE)
    file, first, _ = filled(tmp_path)
    file.give_back(first)
    assert not first.any()


def test_other_memory_is_not_given_back(tmp_path: Path) -> None:
    file, first, _ = filled(tmp_path)
    for foreign in (torch.ones(4096), filled(tmp_path)[1]):
        assert not file.holds(foreign)
        with pytest.raises(ValueError, match="does not lie in this file"):
            file.give_back(foreign)
    assert file.holds(first[3:])
    file.give_back(first[:0])


def test_a_file_has_zeros_no_name_and_an_end(tmp_path: Path) -> None:
    file = PagedFile(tmp_path, 2 * place_bytes((3,), torch.uint8))
    a, b = file.zeros((3,), dtype=torch.uint8), file.zeros((3, 1), dtype=torch.uint8)
    assert a.tolist() == [0, 0, 0]
    assert b.tolist() == [[0], [0], [0]]
    a.fill_(1)
    assert not b.any()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="cannot hold"):
        file.zeros((mmap.PAGESIZE,), dtype=torch.uint8)


def test_a_disk_that_is_too_small_is_told(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"need 1152921504\.61 GB, .* GB are free"):
        PagedFile(tmp_path, 1 << 60)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(DiskFullError, match="need"):
            PagedFile(tmp_path, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_the_order_of_memory() -> None:
    values = torch.arange(6).view(2, 3)
    for tensor in (values, values.t(), values.t().unsqueeze(1)):
        assert in_memory_order(tensor).tolist() == [0, 1, 2, 3, 4, 5]
    for tensor in (values[:, :2], torch.zeros(1).expand(3)):
        with pytest.raises(ValueError, match="has gaps"):
            in_memory_order(tensor)
