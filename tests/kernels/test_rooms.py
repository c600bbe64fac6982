"""Memory that is used again: never while somebody holds it, by what has about its size, and not for ever."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from fitune.kernels import rooms as room_file
from fitune.kernels.rooms import HUGE_BYTES, SMALLEST_BYTES, a_pass, empty, private_memory, rooms

SIZE = 4 * SMALLEST_BYTES


@pytest.fixture(autouse=True)
def no_rooms() -> None:
    rooms.clear()


def of(size: int) -> torch.Tensor:
    return empty((size,), torch.uint8)


def test_what_is_held_is_never_given_again() -> None:
    with a_pass():
        held = [of(SIZE).fill_(number) for number in range(8)]
        views = [held[0].view(torch.bfloat16)[5:9], held.pop(1)[:10]]
        for number in range(40):
            of(SIZE).fill_(100 + number)
    assert [int(tensor[-1]) for tensor in held] == [0, 2, 3, 4, 5, 6, 7]
    assert views[1].tolist() == [1] * 10


def test_what_autograd_saves_is_held() -> None:
    weight = torch.ones(SIZE // 4, requires_grad=True)
    with a_pass():
        saved = empty((SIZE // 4,), torch.float32).fill_(3.0)
        product = (weight * saved).sum()
        del saved
        for _ in range(4):
            of(SIZE).fill_(255)
        product.backward()
    assert weight.grad is not None
    assert set(weight.grad.tolist()) == {3.0}


def test_a_room_is_taken_again_by_its_own_size_and_a_little_less() -> None:
    with a_pass():
        address = of(SIZE).data_ptr()
        assert of(SIZE).data_ptr() == address
        assert of(int(SIZE / 1.1)).data_ptr() == address
        before = rooms.held_bytes
        small, large = of(SIZE // 2), of(2 * SIZE)
        assert address not in (small.data_ptr(), large.data_ptr())
        assert rooms.held_bytes >= before + SIZE // 2


def test_a_pass_keeps_what_it_used_and_lets_go_of_the_rest() -> None:
    with a_pass():
        first, _ = of(SIZE), of(3 * SIZE)
        address = first.data_ptr()
        del first, _
    assert rooms.held_bytes == 4 * SIZE
    with a_pass():
        assert of(SIZE).data_ptr() == address
    assert rooms.held_bytes == SIZE


def test_other_sizes_do_not_add_up() -> None:
    """Rows of another length in the next pass: the old rooms make way before it ends."""
    with a_pass():
        held = [of(SIZE) for _ in range(6)]
        del held
    with a_pass():
        held = [of(2 * SIZE) for _ in range(3)]
        assert rooms.held_bytes <= 7 * SIZE
        del held


def test_results_keep_their_memory_when_rooms_are_cleared() -> None:
    with a_pass():
        kept = of(SIZE).fill_(7)
    rooms.clear()
    with a_pass():
        of(SIZE).fill_(9)
    assert int(kept.min()) == int(kept.max()) == 7


def test_small_results_and_closed_rooms_go_to_the_heap() -> None:
    with a_pass():
        of(SMALLEST_BYTES - 1)
    of(SIZE)
    assert rooms.held_bytes == 0
    assert not rooms.is_open


def test_threads_have_rooms_of_their_own() -> None:
    found = []
    with a_pass():
        of(SIZE)
        thread = threading.Thread(target=lambda: found.append((room_file.rooms.is_open, room_file.rooms.held_bytes)))
        thread.start()
        thread.join()
    assert found == [(False, 0)]


def test_shapes_and_types_are_as_asked() -> None:
    with a_pass():
        made = empty((3, 128, 1024), torch.bfloat16)
    assert made.shape == (3, 128, 1024)
    assert made.dtype == torch.bfloat16
    assert made.is_contiguous()
    assert not made._is_view()


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux says what memory is")
def test_memory_is_this_process_own_and_in_large_pages_where_there_are_any() -> None:
    memory = private_memory(8 * HUGE_BYTES)
    address = torch.frombuffer(memory, dtype=torch.uint8).fill_(1).data_ptr()
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        start, _, rest = line.partition("-")
        if rest and ":" not in start and int(start, 16) <= address < int(rest.split()[0], 16):
            break
    assert rest.split()[1].endswith("p")  # private
    facts = {name: words.split()[0] for name, _, words in (next(lines).partition(":") for _ in range(20))}
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if enabled.is_file() and "[never]" not in enabled.read_text():
        assert int(facts["AnonHugePages"]) * 1024 >= 4 * HUGE_BYTES
