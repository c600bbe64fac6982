"""Products in 8-bit integers: native against the reference, integer by integer, and the reference against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_passes_with, available_sets
from random_segments import BF16, RandomSegments, error
from test_native import random
from torch import Tensor

from fitune.kernels import int8_products, int8_products_native, int8_products_reference, native
from fitune.quant import nf4

pytestmark = pytest.mark.skipif(
    not int8_products_native.available(), reason=f"no native products in integers: {native.status().instruction_set}"
)
TABLE = nf4.DYNAMIC_MAP


class Layers(RandomSegments):
    """Of the outliers every row has some that are thirty times as large."""

    def __init__(self, depth: int, widths: list[int], ranks: list[int], outliers: list[int] | None = None,
                 block: int = 256, seed: int = 0, dense: tuple[int, ...] = (),
                 biased: tuple[int, ...] = ()) -> None:  # fmt: skip
        super().__init__(depth, widths, ranks, seed, dense, biased)
        self.block = block
        self.outliers = torch.tensor(outliers or [], dtype=torch.int32)
        self.recode()

    def recode(self, backend: str = "native") -> None:
        parts = [(*self.frozen[4 * i : 4 * i + 3], self.offsets[i], width) for i, width in enumerate(self.widths)]
        self.scales = [int8_products.int8_row_scales(*part, self.depth, TABLE, backend) for part in parts]
        self.columns = [
            int8_products.int8_outlier_columns(*part, self.depth, self.outliers, TABLE, backend) for part in parts
        ]

    def forward(self, x: Tensor, backend: str = "native") -> tuple[list[Tensor], list[Tensor]]:
        made = int8_products.int8_product(
            x, self.frozen, self.offsets, self.scales, self.columns, self.outliers, self.factors, TABLE, self.block,
            backend,
        )  # fmt: skip
        return made[: len(self.widths)], made[len(self.widths) :]

    def backward(self, grads: list[Tensor], backend: str = "native") -> tuple[Tensor, list[Tensor]]:
        grad_x, *vs = int8_products.int8_product_backward(
            grads, self.frozen, self.offsets, self.scales, self.depth, self.factors, TABLE, self.block, backend
        )
        return grad_x, vs

    def add_backward(self, grads: list[Tensor], into: Tensor, backend: str = "native") -> Tensor:
        int8_products.int8_product_backward_(
            grads, self.frozen, self.offsets, self.scales, into, self.factors, TABLE, self.block, backend
        )
        return into

    def inputs(self, rows: int, seed: int = 77) -> tuple[Tensor, list[Tensor]]:
        x = random(rows, self.depth, seed=seed)
        x[:, self.outliers.long()] *= 30
        return x.to(BF16), self.grads(rows, seed + 1)


def assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.isfinite().all()
    assert error(found, expected) <= tolerance


def check_all(layers: Layers, rows: int) -> None:
    """Native against the reference: nothing but the last bit of bfloat16 may differ, and that seldom."""
    x, grads = layers.inputs(rows)
    scales, columns = layers.scales, layers.columns
    layers.recode("reference")
    for i, scale in enumerate(scales):
        assert torch.equal(scale, layers.scales[i])
        assert torch.equal(columns[i], layers.columns[i])
    ys, us = layers.forward(x)
    their_ys, their_us = layers.forward(x, "reference")
    for found, expected in zip((*ys, *us), (*their_ys, *their_us), strict=True):
        assert_same(found, expected, 2e-3)
    grad_x, vs = layers.backward(grads)
    their_grad_x, their_vs = layers.backward(grads, "reference")
    for found, expected in zip((grad_x, *vs), (their_grad_x, *their_vs), strict=True):
        assert_same(found, expected, 2e-3)
    start = random(rows, layers.depth, seed=5)
    expected = layers.add_backward(grads, start.clone(), "reference")
    # v's last bit of bfloat16 may differ, and with it the adapters' part
    assert_same(layers.add_backward(grads, start.clone()), expected, 1e-3 if any(layers.ranks) else 1e-6)
    assert_same(layers.add_backward(grads, start.to(BF16)), expected.to(BF16), 3e-3)


@pytest.mark.parametrize("block", [0, 64, 256])
@pytest.mark.parametrize("rows", [0, 1, 3, 32, 33, 100])
def test_layers_of_a_small_model(rows: int, block: int, threads: int) -> None:
    check_all(Layers(192, [192, 64, 64], [16, 16, 16], [3, 64, 191], block), rows)


@pytest.mark.parametrize(
    ("depth", "widths", "ranks", "outliers", "block"),
    [
        (64, [64], [0], [], 256),
        (64, [1], [1], [0], 0),
        (65, [33], [3], [64], 64),  # blocks of 64 straddle rows, and rows begin within a byte
        (96, [40, 7], [5, 0], list(range(40)), 64),
        (1, [5], [2], [], 256),
        (1, [5], [0], [0], 256),  # nothing but an outlier
        (130, [70, 3, 100], [17, 33, 64], [1, 129], 128),
        (576, [576, 192, 192], [8, 8, 8], list(range(5, 576, 18)), 256),
        (2112, [96], [16], [7], 256),  # several stages of depth
        (2112, [96], [0], [], 0),
        (160, [2112, 1100], [16, 4], [], 256),
        (160, [2112], [4], [], 0),
        (4160, [300], [0], [], 2048),
    ],
)
def test_any_shape(
    depth: int, widths: list[int], ranks: list[int], outliers: list[int], block: int, threads: int
) -> None:
    check_all(Layers(depth, widths, ranks, outliers, block), 70)


def test_dense_weights_and_biases(threads: int) -> None:
    check_all(Layers(131, [45, 64], [4, 0], [9], dense=(0, 1), biased=(0,)), 40)
    check_all(Layers(128, [45, 64, 31], [4, 0, 16], dense=(1,), biased=(0, 1, 2)), 40)


def test_more_rows_than_a_slab(threads: int) -> None:
    check_all(Layers(64, [64, 32], [4, 0], [63]), 4100)


@pytest.mark.parametrize("rows", [2260, 2304, 2500])
def test_a_last_slab_that_needs_more_than_the_first(rows: int, threads: int) -> None:
    """Of fewer rows, it may be shared out among the threads in another way."""
    check_all(Layers(576, [576, 192, 192], [16, 16, 16], [5, 300]), rows)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.integers(1, 80), st.integers(1, 150),
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 40)), min_size=1, max_size=4),
    st.sets(st.integers(0, 149)), st.sampled_from([0, 64, 128]), st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape_at_random(
    rows: int, depth: int, parts: list[tuple[int, int]], outliers: set[int], block: int, seed: int
) -> None:
    apart = sorted(o for o in outliers if o < depth)
    widths, ranks = [n for n, _ in parts], [r for _, r in parts]
    check_all(Layers(depth, widths, ranks, apart, block, seed, dense=(2,), biased=(1,)), rows)


@pytest.mark.parametrize("depth", [64, 320, 1000])
@pytest.mark.parametrize("dense", [(), (0,)])
def test_integers_and_scales_are_the_references(depth: int, dense: tuple[int, ...], threads: int) -> None:
    """Of a single block the sums are exact: the results have the bits that the definition gives."""
    layers = Layers(depth, [200], [0], [2, 60], block=0, dense=dense)
    x, grads = layers.inputs(50)
    codes, scales = int8_products_reference.code_rows(x.float().index_fill(1, layers.outliers.long(), 0.0), 0)
    assert codes.abs().amax() == 127
    weight = int8_products_reference.code_weight(layers.weight(0, torch.float32), layers.scales[0])
    assert weight.abs().amax() == 127
    sums = (codes.double() @ weight.double().t()).float()  # exact: below 2^24
    layers.outliers, layers.columns = layers.outliers[:0], []
    cut = x.index_fill(1, torch.tensor([2, 60]), 0)
    assert torch.equal(layers.forward(cut)[0][0], (sums * scales * layers.scales[0]).to(BF16))
    codes, scales = int8_products_reference.code_rows(grads[0].float() * layers.scales[0], 0)
    sums = (codes.double() @ weight.double()).float()
    found = layers.add_backward(grads, torch.zeros(50, depth))
    assert torch.equal(found, sums * scales)


def test_ties_go_to_the_even_integer() -> None:
    layers = Layers(64, [64], [0], block=0, dense=(0,))
    layers.frozen[0] = torch.eye(64, dtype=BF16) * 127
    layers.recode()
    x = torch.zeros(1, 64)
    x[0, :8] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127])
    found = layers.forward(x.to(BF16))[0][0] / 127
    assert found[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, -127]


@pytest.mark.parametrize(("block", "outliers", "most"), [(256, True, 0.02), (256, False, 0.12), (0, False, 0.25)])
def test_distance_from_arithmetic_in_float64(block: int, outliers: bool, most: float) -> None:
    """The recoding's own error, and that outliers and blocks pay."""
    layers = Layers(576, [300], [16], [3, 200, 500], block)
    x, grads = layers.inputs(60)
    if not outliers:
        layers.outliers, layers.columns = layers.outliers[:0], []
    exact = x.double() @ layers.weight(0, torch.float32).double().t() + x.double() @ (
        layers.factors[0].double().t() @ layers.factors[1].double().t()
    )
    assert error(layers.forward(x)[0][0], exact) < most
    adapters = layers.factors[1].double() @ layers.factors[0].double()
    exact = grads[0].double() @ (layers.weight(0, torch.float32).double() + adapters)
    assert error(layers.backward(grads)[0], exact) < 0.02


def test_bits_do_not_depend_on_threads_or_time() -> None:
    layers = Layers(1152, [1200, 192], [16, 8], [5, 900])
    x, grads = layers.inputs(150)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 2, 3, 7):
        torch.set_num_threads(count)
        (ys, us), (grad_x, vs) = layers.forward(x), layers.backward(grads)
        layers.recode()
        results.append([*ys, *us, grad_x, *vs, *layers.scales, *layers.columns])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_strides_and_odd_addresses() -> None:
    layers = Layers(192, [100, 64], [5, 16], [0, 70])
    x, grads = layers.inputs(50)
    ys, _ = layers.forward(x)
    grad_x, _ = layers.backward(grads)
    wide = random(50, 400, dtype=BF16)
    wide[:, 33:225] = x
    assert all(torch.equal(one, two) for one, two in zip(ys, layers.forward(wide[:, 33:225])[0], strict=True))
    both = torch.cat([grads[0], grads[1]], dim=1)
    assert torch.equal(layers.backward([both[:, :100], both[:, 100:]])[0], grad_x)
    into = torch.zeros(50, 300)
    layers.add_backward(grads, into[:, 7:199])
    assert torch.equal(into[:, 7:199].to(BF16), grad_x)
    assert not into[:, :7].any()
    assert not into[:, 199:].any()
    for i, tensor in enumerate(layers.frozen):
        if tensor is not None and tensor.dtype == torch.uint8:
            layers.frozen[i] = torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:]
    layers.recode()
    assert torch.equal(layers.forward(x)[0][1], ys[1])


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(odd: float) -> None:
    layers = Layers(100, [50, 40], [4, 0], [3], dense=(1,))
    for column in (3, 70):  # an outlier, and one of the integers
        x, grads = layers.inputs(45)
        x[7, column] = odd
        ys, us = layers.forward(x)
        for y in (*ys, us[0]):
            assert not y[7].isfinite().any()
            assert y[:7].isfinite().all()
            assert y[8:].isfinite().all()
    grads[1][9, 39] = odd
    grad_x, _ = layers.backward(grads)
    assert not grad_x[9].isfinite().any()
    assert grad_x[:9].isfinite().all()
    assert grad_x[10:].isfinite().all()
    x, grads = layers.inputs(45)
    dense = layers.frozen[4]
    assert dense is not None
    dense[39, 99] = odd
    layers.recode()
    assert layers.scales[1][39].isnan()
    ys, _ = layers.forward(x)
    assert not ys[1][:, 39].isfinite().any()
    assert ys[1][:, :39].isfinite().all()
    assert ys[0].isfinite().all()
    assert not layers.backward(grads)[0].isfinite().any()


def test_rows_of_zeros_and_of_tiny_values_give_zeros() -> None:
    layers = Layers(128, [64], [0], dense=(0,))
    x, grads = layers.inputs(5)
    x[1], x[2, :], layers.frozen[0][7] = 0, 1e-37, 0
    layers.recode()
    y, grad_x = layers.forward(x)[0][0], layers.backward(grads)[0]
    assert not y[1:3].any()
    assert not y[:, 7].any()
    assert y[0].any()
    assert grad_x.isfinite().all()


@pytest.mark.parametrize(
    "change", ["code", "absmax", "offset", "scale", "column", "outlier", "a", "b", "bias", "order"]
)
def test_a_wrong_operand_is_noticed(change: str) -> None:
    layers = Layers(128, [64, 64], [4, 4], [3, 100], biased=(0,))
    x, _ = layers.inputs(33)
    expected = layers.forward(x, "reference")[0][0]
    frozen, factors = layers.frozen, layers.factors
    if change == "code":
        codes = frozen[0].clone()
        codes[64:128] ^= 0x10
        frozen[0] = codes
    elif change == "absmax":
        frozen[1] = frozen[1].roll(1)
    elif change == "offset":
        layers.offsets[0] *= 1.02
    elif change == "scale":
        layers.scales[0] = layers.scales[0].roll(1)
    elif change == "column":
        layers.columns[0] = layers.columns[0].roll(1, 1)
    elif change == "outlier":
        layers.outliers = torch.tensor([4, 100], dtype=torch.int32)
    elif change in ("a", "b"):
        factors[int(change == "b")] = factors[int(change == "b")].roll(1, 0)
    elif change == "bias":
        frozen[3] = frozen[3].roll(1)
    else:
        frozen[:3], frozen[4:7] = frozen[4:7], frozen[:3]
    with pytest.raises(AssertionError):
        assert_same(layers.forward(x)[0][0], expected, 2e-3)


def test_torchs_own_products_in_between_stay_right() -> None:
    """oneDNN uses the same tiles in the same threads, and may think that its configuration is still loaded."""
    layers = Layers(576, [576, 192], [16, 16], [7])
    x, grads = layers.inputs(130)
    left, right = random(130, 576, dtype=BF16, seed=3), random(576, 200, dtype=BF16, seed=4)
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        ours, theirs = layers.forward(x)[0][0], torch.mm(left, right)
        for _ in range(4):
            assert torch.equal(layers.forward(x)[0][0], ours)
            assert torch.equal(torch.mm(left, right), theirs)
            layers.backward(grads)
            assert torch.equal(torch.mm(left, right), theirs)
    torch.set_num_threads(before)


def test_operands_that_do_not_fit_are_refused() -> None:
    layers = Layers(64, [32], [4], [5])
    x, grads = layers.inputs(8)

    def forward(**other: object) -> Callable[[], object]:
        values: dict[str, object] = {
            "x": x, "frozen": layers.frozen, "offsets": layers.offsets, "scales": layers.scales,
            "columns": layers.columns, "outliers": layers.outliers, "factors": layers.factors, "table": TABLE,
            "block": 256, "backend": "native",
        }  # fmt: skip
        return lambda: int8_products.int8_product(**{**values, **other})

    ruined: list[Callable[[], object]] = [
        forward(x=x[:, :63]),
        forward(scales=[layers.scales[0][:31]]),
        forward(scales=[]),
        forward(columns=[]),
        forward(columns=[layers.columns[0].float()]),
        forward(outliers=torch.tensor([64], dtype=torch.int32)),
        forward(outliers=torch.tensor([-1], dtype=torch.int32)),
        forward(outliers=torch.tensor([5])),
        forward(outliers=torch.tensor([5, 5], dtype=torch.int32)),
        forward(frozen=layers.frozen[:3]),
        forward(table=TABLE[:9]),
        forward(block=100),
        forward(block=-64),
        lambda: layers.backward([grads[0][:, :31]]),
    ]
    for call in ruined:
        with pytest.raises((ValueError, RuntimeError)):
            call()


def test_fakes_have_the_shapes_of_the_real_ones() -> None:
    layers = Layers(96, [40, 24], [5, 0], [2, 90])
    x, grads = layers.inputs(6)
    calls: list[tuple[object, tuple[object, ...]]] = [
        (torch.ops.fitune.int8_row_scales.default, (*layers.frozen[:3], layers.offsets[0], 40, 96, TABLE, "native")),
        (
            torch.ops.fitune.int8_outlier_columns.default,
            (*layers.frozen[:3], layers.offsets[0], 40, 96, layers.outliers, TABLE, "native"),
        ),
        (
            torch.ops.fitune.int8_product.default,
            (x, layers.frozen, layers.offsets, layers.scales, layers.columns, layers.outliers, layers.factors, TABLE,
             256, "native"),
        ),
        (
            torch.ops.fitune.int8_product_backward.default,
            (grads, layers.frozen, layers.offsets, layers.scales, 96, layers.factors, TABLE, 256, "native"),
        ),
        (
            torch.ops.fitune.int8_product_backward_.default,
            (grads, layers.frozen, layers.offsets, layers.scales, torch.zeros(6, 96), layers.factors, TABLE, 256,
             "native"),
        ),
    ]  # fmt: skip
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in available_sets()[1:] if "bf16" in name])
def test_the_other_instruction_sets_pass_the_same_tests(name: str) -> None:
    assert_passes_with(name, ["fakes", "random", "small"], "test_int8_products.py")
