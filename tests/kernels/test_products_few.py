"""Forward products of a few rows, as generation makes them, which take a road of their own (csrc/product_few.inc)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_passes_with, available_sets
from random_segments import BF16, error
from test_native import random
from test_products import Layers, assert_as_near

from fitune.kernels import native, products_native

pytestmark = pytest.mark.skipif(
    not products_native.available(), reason=f"no native products: {native.status().instruction_set}"
)
MANY = 200  # rows that are more than few


def check(layers: Layers, rows: int) -> None:
    """Against float64 arithmetic, and to the bit against the same rows among many."""
    x, _ = layers.inputs(MANY)
    ys, us = layers.forward(x[:rows])
    their_ys, their_us = layers.forward(x[:rows], "reference")
    many_ys, many_us = layers.forward(x)
    for i, exact in enumerate(layers.exact_forward(x[:rows])):
        assert_as_near(ys[i], their_ys[i], exact)
        assert torch.equal(ys[i], many_ys[i][:rows])
        assert torch.equal(us[i], many_us[i][:rows])
        a = layers.factors[2 * i]
        assert us[i].shape == (rows, layers.ranks[i])
        if a is not None:
            assert_as_near(us[i], their_us[i], x[:rows].double() @ a.double().t())


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129])
def test_every_number_of_rows(rows: int) -> None:
    check(Layers(192, [192, 64, 70], [16, 16, 0], dense=(1,), biased=(2,)), rows)


@pytest.mark.parametrize("dense", [(), (0, 1, 2)], ids=["nf4", "dense"])
@pytest.mark.parametrize(
    ("depth", "widths", "ranks"),
    [
        (64, [32], [0]),
        (1, [1], [1]),
        (65, [33], [3]),  # blocks of 64 straddle rows, and rows begin within a byte
        (37, [64], [40]),
        (96, [40, 7], [5, 0]),
        (130, [70, 3, 100], [17, 33, 64]),
        (576, [576, 192, 192], [8, 8, 8]),
        (2112, [96], [16]),  # several stages of depth among many
        (1088, [300], [0]),
        (8256, [64], [4]),  # 129 blocks a row: scales whose outer scale changes within a row
    ],
)
def test_any_shape(depth: int, widths: list[int], ranks: list[int], dense: tuple[int, ...], threads: int) -> None:
    biased = (0,) if threads == 2 else ()
    check(Layers(depth, widths, ranks, dense=dense, biased=biased), 16 * threads - 3)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.integers(1, 130), st.integers(1, 300),
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 40)), min_size=1, max_size=4), st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape_at_random(rows: int, depth: int, parts: list[tuple[int, int]], seed: int) -> None:
    layers = Layers(depth, [n for n, _ in parts], [r for _, r in parts], seed, dense=(1, 2), biased=(1, 3))
    check(layers, rows)


def test_bits_do_not_depend_on_threads_or_time() -> None:
    layers = Layers(1152, [1200, 192, 96], [16, 8, 40], dense=(1,))
    before = torch.get_num_threads()
    for rows in (1, 16, 40):
        x, _ = layers.inputs(rows)
        results = []
        for count in (1, 2, 2, 3, 7):
            torch.set_num_threads(count)
            ys, us = layers.forward(x)
            results.append([*ys, *us])
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_strides_and_odd_addresses() -> None:
    layers = Layers(192, [100, 64], [5, 16], dense=(1,))
    x, _ = layers.inputs(20)
    ys, us = layers.forward(x)
    wide = random(20, 400, dtype=BF16)
    wide[:, 33:225] = x
    for same in (wide[:, 33:225], x.t().contiguous().t()):
        found = layers.forward(same)
        assert all(torch.equal(one, two) for one, two in zip([*ys, *us], [*found[0], *found[1]], strict=True))
    assert torch.equal(layers.forward(x[:1].expand(3, -1))[0][0], ys[0][:1].expand(3, -1))
    for i, tensor in enumerate(layers.frozen):
        if tensor is not None and tensor.dtype in (torch.uint8, BF16):
            moved = torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:]
            layers.frozen[i] = moved.view(tensor.shape)
    assert torch.equal(layers.forward(x)[0][0], ys[0])
    assert torch.equal(layers.forward(x)[0][1], ys[1])


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_or_column(odd: float) -> None:
    layers = Layers(100, [50, 40], [4, 3], dense=(1,))
    x, _ = layers.inputs(19)
    x[7, 3] = odd
    ys, us = layers.forward(x)
    for y in (*ys, *us):
        assert not y[7].isfinite().any()
        assert y[:7].isfinite().all()
        assert y[8:].isfinite().all()
    x, _ = layers.inputs(19)
    weight, b = layers.frozen[4], layers.factors[3]
    assert weight is not None
    assert b is not None
    weight[39, 99] = odd
    b[5, 2] = odd
    ys, us = layers.forward(x)
    ruined = torch.tensor([i in (5, 39) for i in range(40)])
    assert not ys[1][:, ruined].isfinite().any()
    assert ys[1][:, ~ruined].isfinite().all()
    assert all(other.isfinite().all() for other in (ys[0], *us))


@pytest.mark.parametrize("change", ["code", "scale", "outer scale", "offset", "weight", "a", "b", "bias", "order"])
def test_a_wrong_operand_is_noticed(change: str) -> None:
    layers = Layers(8256, [64, 64], [4, 4], dense=(1,), biased=(0,))
    x, _ = layers.inputs(3)
    exact = layers.exact_forward(x)
    theirs = layers.forward(x, "reference")[0]
    frozen, factors, which = layers.frozen, layers.factors, 0
    if change == "code":
        frozen[0] = frozen[0].clone()
        frozen[0][64:128] ^= 0x70
    elif change == "scale":
        frozen[1] = frozen[1].roll(1)
    elif change == "outer scale":
        frozen[2] = frozen[2] * 2
    elif change == "offset":
        layers.offsets[0] *= 1.02
    elif change == "weight":
        which = 1
        frozen[4] = frozen[4].roll(1, 1)
    elif change in ("a", "b"):
        factors[int(change == "b")] = factors[int(change == "b")].roll(1, 0)
    elif change == "bias":
        frozen[3] = frozen[3].roll(1)
    else:
        which = 1
        frozen[4] = frozen[4].flip(0)
    with pytest.raises(AssertionError):
        assert_as_near(layers.forward(x)[0][which], theirs[which], exact[which])


def test_torchs_own_products_in_between_stay_right() -> None:
    """oneDNN uses the same tiles in the same threads, and may think that its configuration is still loaded."""
    layers = Layers(576, [576, 192], [16, 16], dense=(1,))
    x, _ = layers.inputs(16)
    left, right = random(130, 576, dtype=BF16, seed=3), random(576, 200, dtype=BF16, seed=4)
    small = random(5, 24, dtype=BF16, seed=5), random(24, 9, dtype=BF16, seed=6)
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        ours, theirs, theirs_small = layers.forward(x)[0][0], torch.mm(left, right), torch.mm(*small)
        assert error(theirs, left.double() @ right.double()) < 0.01
        for _ in range(4):
            assert torch.equal(layers.forward(x)[0][0], ours)
            assert torch.equal(torch.mm(left, right), theirs)
            assert torch.equal(layers.forward(x)[0][0], ours)
            assert torch.equal(torch.mm(*small), theirs_small)
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in available_sets()[1:] if "bf16" in name])
def test_the_other_instruction_sets_pass_the_same_tests(name: str) -> None:
    assert_passes_with(name, [], "test_products_few.py")
