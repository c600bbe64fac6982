"""Products with frozen weights: native against float64 arithmetic on the decoded weights, as near as torch's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_passes_with, available_sets
from random_segments import BF16, RandomSegments, error
from test_native import random
from torch import Tensor

from fitune.kernels import native, products, products_native
from fitune.quant import nf4

pytestmark = pytest.mark.skipif(
    not products_native.available(), reason=f"no native products: {native.status().instruction_set}"
)


class Layers(RandomSegments):
    """With the operators, and what they should give in float64."""

    def forward(self, x: Tensor, backend: str = "native") -> tuple[list[Tensor], list[Tensor]]:
        made = products.frozen_product(
            x, self.frozen, self.offsets, self.widths, self.factors, nf4.DYNAMIC_MAP, backend
        )
        return made[: len(self.widths)], made[len(self.widths) :]

    def backward(self, grads: list[Tensor], backend: str = "native") -> tuple[Tensor, list[Tensor]]:
        grad_x, *vs = products.frozen_product_backward(
            grads, self.frozen, self.offsets, self.depth, self.factors, nf4.DYNAMIC_MAP, backend
        )
        return grad_x, vs

    def exact_forward(self, x: Tensor) -> list[Tensor]:
        made = []
        for i in range(len(self.widths)):
            y = x.double() @ self.weight(i).double().t()
            a, b, bias = self.factors[2 * i], self.factors[2 * i + 1], self.frozen[4 * i + 3]
            if a is not None and b is not None:
                y += x.double() @ a.double().t() @ b.double().t()
            made.append(y if bias is None else y + bias.double())
        return made

    def exact_backward(self, grads: list[Tensor]) -> Tensor:
        total = torch.zeros(grads[0].shape[0], self.depth, dtype=torch.float64)
        for i, grad in enumerate(grads):
            total += grad.double() @ self.weight(i).double()
            a, b = self.factors[2 * i], self.factors[2 * i + 1]
            if a is not None and b is not None:
                total += grad.double() @ b.double() @ a.double()
        return total

    def inputs(self, rows: int, seed: int = 77) -> tuple[Tensor, list[Tensor]]:
        return random(rows, self.depth, dtype=BF16, seed=seed), self.grads(rows, seed + 1)


def assert_as_near(found: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """At most twice as far from the exact result as torch's own bfloat16 arithmetic is."""
    assert found.shape == exact.shape
    assert error(found, exact) <= 2 * error(theirs, exact) + 1e-7


def check_all(layers: Layers, rows: int) -> None:
    x, grads = layers.inputs(rows)
    ys, us = layers.forward(x)
    their_ys, their_us = layers.forward(x, "reference")
    for i, exact in enumerate(layers.exact_forward(x)):
        assert_as_near(ys[i], their_ys[i], exact)
        a = layers.factors[2 * i]
        assert us[i].shape == (rows, layers.ranks[i])
        if a is not None:
            assert_as_near(us[i], their_us[i], x.double() @ a.double().t())
    exact = layers.exact_backward(grads)
    grad_x, vs = layers.backward(grads)
    their_grad_x, their_vs = layers.backward(grads, "reference")
    assert_as_near(grad_x, their_grad_x, exact)
    for i, v in enumerate(vs):
        b = layers.factors[2 * i + 1]
        assert v.shape == (rows, layers.ranks[i])
        if b is not None:
            assert_as_near(v, their_vs[i], grads[i].double() @ b.double())
    into = random(rows, layers.depth, seed=5)
    for start in (into, into.to(BF16)):
        ours, theirs = start.clone(), start.clone()
        for target, backend in ((ours, "native"), (theirs, "reference")):
            products.frozen_product_backward_(
                grads, layers.frozen, layers.offsets, target, layers.factors, nf4.DYNAMIC_MAP, backend
            )
        assert_as_near(ours, theirs, start.double() + exact)
    scalings = [0.5 + i for i in range(len(ys))]
    ours = products.adapter_gradients(grads, x, us, vs, scalings, "native")
    for i, (grad, u, v) in enumerate(zip(grads, us, vs, strict=True)):
        pairs = (
            (ours[2 * i], v.double().t() @ x.double()),
            (ours[2 * i + 1], scalings[i] * grad.double().t() @ u.double()),
        )
        for found, expected in pairs:
            assert found.dtype == torch.float32
            assert found.shape == expected.shape
            assert error(found, expected) < 1e-5 if found.numel() and rows else not found.any()
    grown = [tensor.clone() for tensor in ours]
    products.adapter_gradients_(grads, x, grown, us, vs, scalings, "native")
    for one, two in zip(ours, grown, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 3, 31, 32, 33, 100])
def test_layers_of_a_small_model(rows: int, threads: int) -> None:
    check_all(Layers(192, [192, 64, 64], [16, 16, 16]), rows)


@pytest.mark.parametrize(
    ("depth", "widths", "ranks"),
    [
        (64, [64], [0]),
        (64, [1], [1]),
        (65, [33], [3]),  # blocks of 64 straddle rows, and rows begin within a byte
        (96, [40, 7], [5, 0]),
        (1, [5], [2]),
        (37, [64], [40]),
        (130, [70, 3, 100], [17, 33, 64]),
        (576, [576, 192, 192], [8, 8, 8]),
        (2112, [96], [16]),  # several stages of depth
        (160, [2112, 1100], [16, 4]),
        (1088, [300], [0]),
    ],
)
def test_any_shape(depth: int, widths: list[int], ranks: list[int], threads: int) -> None:
    check_all(Layers(depth, widths, ranks), 70)


def test_dense_weights_and_biases(threads: int) -> None:
    check_all(Layers(131, [45, 64], [4, 0], dense=(0, 1), biased=(0,)), 40)
    check_all(Layers(128, [45, 64, 31], [4, 0, 16], dense=(1,), biased=(0, 1, 2)), 40)


def test_more_rows_than_a_slab(threads: int) -> None:
    check_all(Layers(64, [64, 32], [4, 0]), 4100)


@pytest.mark.parametrize("rows", [2260, 2304, 2500])
def test_a_last_slab_that_needs_more_than_the_first(rows: int, threads: int) -> None:
    """Of fewer rows, it may be shared out among the threads in another way."""
    check_all(Layers(576, [576, 192, 192], [16, 16, 16]), rows)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.integers(1, 80), st.integers(1, 150),
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 40)), min_size=1, max_size=4), st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape_at_random(rows: int, depth: int, parts: list[tuple[int, int]], seed: int) -> None:
    check_all(Layers(depth, [n for n, _ in parts], [r for _, r in parts], seed, dense=(2,), biased=(1,)), rows)


def test_bits_do_not_depend_on_threads_or_time() -> None:
    layers = Layers(1152, [1200, 192], [16, 8])
    x, grads = layers.inputs(150)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 2, 3, 7):
        torch.set_num_threads(count)
        ys, us = layers.forward(x)
        grad_x, vs = layers.backward(grads)
        results.append([*ys, *us, grad_x, *vs, *products.adapter_gradients(grads, x, us, vs, [1.0, 2.0], "native")])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_strides_and_odd_addresses() -> None:
    layers = Layers(192, [100, 64], [5, 16])
    x, grads = layers.inputs(50)
    ys, us = layers.forward(x)
    grad_x, vs = layers.backward(grads)
    wide = random(50, 400, dtype=BF16)
    wide[:, 33:225] = x
    found = layers.forward(wide[:, 33:225])
    assert all(torch.equal(one, two) for one, two in zip(ys, found[0], strict=True))
    assert torch.equal(layers.forward(x.t().contiguous().t())[0][0], ys[0])
    both = torch.cat([grads[0], grads[1]], dim=1)
    cut = [both[:, :100], both[:, 100:]]
    assert torch.equal(layers.backward(cut)[0], grad_x)
    expected = products.adapter_gradients(grads, x, us, vs, [1.0, 1.0], "native")
    for one, two in zip(products.adapter_gradients(cut, wide[:, 33:225], us, vs, [1.0, 1.0], "native"), expected,
                        strict=True):  # fmt: skip
        assert torch.equal(one, two)
    into = torch.zeros(50, 300)
    products.frozen_product_backward_(
        grads, layers.frozen, layers.offsets, into[:, 7:199], layers.factors, nf4.DYNAMIC_MAP, "native"
    )
    assert torch.equal(into[:, 7:199].to(BF16), grad_x)
    assert not into[:, :7].any()
    assert not into[:, 199:].any()
    for i, tensor in enumerate(layers.frozen):
        if tensor is not None and tensor.dtype == torch.uint8:
            layers.frozen[i] = torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:]
    assert torch.equal(layers.forward(x)[0][1], ys[1])


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_or_column(odd: float) -> None:
    layers = Layers(100, [50, 40], [4, 0], dense=(1,))
    x, grads = layers.inputs(45)
    x[7, 3] = odd
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
    ys, _ = layers.forward(x)
    assert not ys[1][:, 39].isfinite().any()
    assert ys[1][:, :39].isfinite().all()
    assert ys[0].isfinite().all()
    grad_x, _ = layers.backward(grads)
    assert not grad_x[:, 99].isfinite().any()
    assert grad_x[:, :99].isfinite().all()


@pytest.mark.parametrize("change", ["code", "scale", "offset", "a", "b", "bias", "order"])
def test_a_wrong_operand_is_noticed(change: str) -> None:
    layers = Layers(128, [64, 64], [4, 4], biased=(0,))
    x, _ = layers.inputs(33)
    exact = layers.exact_forward(x)[0]
    theirs = layers.forward(x, "reference")[0][0]
    frozen, factors = layers.frozen, layers.factors
    if change == "code":
        codes = frozen[0].clone()
        codes[64:128] ^= 0x10
        frozen[0] = codes
    elif change == "scale":
        frozen[1] = frozen[1].roll(1)
    elif change == "offset":
        layers.offsets[0] *= 1.02
    elif change in ("a", "b"):
        factors[int(change == "b")] = factors[int(change == "b")].roll(1, 0)
    elif change == "bias":
        frozen[3] = frozen[3].roll(1)
    else:
        frozen[:3], frozen[4:7] = frozen[4:7], frozen[:3]
    with pytest.raises(AssertionError):
        assert_as_near(layers.forward(x)[0][0], theirs, exact)


def test_torchs_own_products_in_between_stay_right() -> None:
    """oneDNN uses the same tiles in the same threads, and may think that its configuration is still loaded."""
    layers = Layers(576, [576, 192], [16, 16])
    x, grads = layers.inputs(130)
    left, right = random(130, 576, dtype=BF16, seed=3), random(576, 200, dtype=BF16, seed=4)
    small = random(5, 24, dtype=BF16, seed=5), random(24, 9, dtype=BF16, seed=6)
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        ours, theirs, theirs_small = layers.forward(x), torch.mm(left, right), torch.mm(*small)
        assert error(theirs, left.double() @ right.double()) < 0.01
        for _ in range(4):
            found = layers.forward(x)
            assert torch.equal(found[0][0], ours[0][0])
            assert torch.equal(torch.mm(left, right), theirs)
            layers.backward(grads)
            assert torch.equal(torch.mm(*small), theirs_small)
            assert torch.equal(torch.mm(left, right), theirs)
            products.adapter_gradients(grads, x, found[1], found[1], [1.0, 1.0], "native")
            assert torch.equal(torch.mm(*small), theirs_small)
    torch.set_num_threads(before)


def test_operands_that_do_not_fit_are_refused() -> None:
    layers = Layers(64, [32], [4])
    x, grads = layers.inputs(8)
    ruined: list[Callable[[], object]] = [
        lambda: layers.forward(x[:, :63]),
        lambda: products.frozen_product(x, layers.frozen, [0.0], [31], layers.factors, nf4.DYNAMIC_MAP, "native"),
        lambda: products.frozen_product(x, layers.frozen, [0.0], [32], layers.factors, nf4.DYNAMIC_MAP[:9], "native"),
        lambda: products.frozen_product(x, layers.frozen[:3], [0.0], [32], layers.factors, nf4.DYNAMIC_MAP, "native"),
        lambda: products.frozen_product(
            x, layers.frozen, [0.0], [32], [layers.factors[0].float(), layers.factors[1]], nf4.DYNAMIC_MAP, "native"
        ),
        lambda: layers.backward([grads[0][:, :31]]),
        lambda: products.adapter_gradients([grads[0][:7]], x, [grads[0]], [grads[0]], [1.0], "native"),
    ]
    for call in ruined:
        with pytest.raises(ValueError, match=r"native product got|frozen tensors"):
            call()


def operands() -> dict[str, tuple[object, ...]]:
    layers = Layers(64, [32, 20], [4, 0])
    x, grads = layers.inputs(5)
    frozen = (layers.frozen, layers.offsets)
    us = [random(5, rank, dtype=BF16) for rank in layers.ranks]
    into = [torch.zeros(4, 64), torch.zeros(32, 4), torch.zeros(0, 64), torch.zeros(20, 0)]
    table = nf4.DYNAMIC_MAP
    return {
        "frozen_product": (x, *frozen, layers.widths, layers.factors, table),
        "frozen_product_backward": (grads, *frozen, 64, layers.factors, table),
        "frozen_product_backward_": (grads, *frozen, torch.zeros(5, 64), layers.factors, table),
        "adapter_gradients": (grads, x, us, us, [1.0, 2.0]),
        "adapter_gradients_": (grads, x, into, us, us, [1.0, 2.0]),
    }


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", list(operands()) if products_native.available() else [])
def test_schema_and_fake_are_what_the_operator_does(name: str, backend: str) -> None:
    operator = getattr(products, name)
    torch.library.opcheck(operator, (*operands()[name], backend), test_utils=("test_schema", "test_faketensor"))


def test_fake_tensors_never_reach_native_code() -> None:
    script = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from fitune.kernels import products
with FakeTensorMode():
    x, w = torch.empty(8, 64, dtype=torch.bfloat16), torch.empty(32, 64, dtype=torch.bfloat16)
    a, b, table = w[:4], torch.empty(32, 4, dtype=torch.bfloat16), torch.empty(256)
    y, u = products.frozen_product(x, [w, None, None, None], [0.0], [32], [a, b], table, "native")
    grad_x, v = products.frozen_product_backward([y], [w, None, None, None], [0.0], 64, [a, b], table, "native")
    made = products.adapter_gradients([y], x, [u], [v], [1.0], "native")
    print([tuple(t.shape) for t in (y, u, grad_x, v, *made)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(8, 32), (8, 4), (8, 64), (8, 4), (4, 64), (32, 4)]"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in available_sets()[1:] if "bf16" in name])
def test_the_other_instruction_sets_pass_the_same_tests(name: str) -> None:
    assert_passes_with(name, ["schema", "fake", "random"], "test_products.py")
