"""Attention of bfloat16 with every instruction set of this machine, against float64 computed from the same inputs.

The gate: at most twice the error of the set that computes every product in float32, plus that of rounding the
probabilities and their gradients to bfloat16 (2**-8 of each at most), and never over 1e-2 of the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instruction_sets import available_sets
from torch import Tensor

from fitune.kernels import native, reference

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
ROUNDING, LIMIT = 2**-8, 1e-2
Documents = list[list[int]]


SETS = available_sets()
DOT_PRODUCTS = [name for name in SETS if name in ("amx", "avx512_bf16")]


def choose(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Native calls from here on go to this set's table."""
    _, status, library = native._load()
    table = library.fitune_kernels(name.encode()).contents
    monkeypatch.setattr(native, "_load", lambda: (table, replace(status, instruction_set=name), library))


@pytest.fixture(params=SETS)
def each_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose(monkeypatch, request.param)
    return request.param


@pytest.fixture(params=DOT_PRODUCTS)
def dot_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose(monkeypatch, request.param)
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(rows: int, tokens: int, heads: int, kv_heads: int, width: int, size: float = 1.0) -> tuple[Tensor, ...]:
    """Queries, keys, values and the gradient of the result."""
    generator = torch.Generator().manual_seed(tokens * 131 + width)
    shapes = [(rows, tokens, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    return tuple((torch.randn(shape, generator=generator) * size).bfloat16() for shape in shapes)


def exact(tensors: tuple[Tensor, ...], documents: Documents, window: int, scale: float, cap: float) -> list[Tensor]:
    """Result, gradients of queries, keys and values, logarithms of the sums: document by document in float64."""
    q, k, v, grad = (x.double() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    group = q.shape[2] // k.shape[2]
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float64)
    for row, start, stop, prefix_start, prefix_stop in documents:
        keys = torch.tensor([*range(prefix_start, prefix_stop), *range(start, stop)])
        ago = torch.arange(len(keys))[len(keys) - (stop - start) :].unsqueeze(1) - torch.arange(len(keys))
        hidden = (ago < 0) | (ago >= window) if window else ago < 0
        wide_keys, wide_values = (x[row, keys].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[row, start:stop], wide_keys) * scale
        scores = (cap * torch.tanh(scores / cap) if cap else scores).masked_fill(hidden, float("-inf"))
        lse[row, :, start:stop] = scores.logsumexp(-1).detach()
        out[row, start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide_values)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), lse]


def run(tensors: tuple[Tensor, ...], documents: Documents, window: int, scale: float, cap: float) -> list[Tensor]:
    q, k, v, grad = tensors
    where = torch.tensor(documents, dtype=torch.int32).reshape(-1, 5)
    out, lse = native.attention(q, k, v, where, window, scale, cap)
    return [out, *native.attention_backward(grad, q, k, v, out, lse, where, window, scale, cap), lse]


def errors(found: list[Tensor], expected: list[Tensor], grad: Tensor) -> list[float]:
    """Relative norms; with a window of one token the gradients of queries and keys are exactly zero."""
    least = 0.1 * float(grad.norm())
    return [
        float((one.double() - other).norm()) / max(float(other.norm()), least)
        for one, other in zip(found[:4], expected[:4], strict=True)
    ]


def check(
    tensors: tuple[Tensor, ...], documents: Documents, window: int = 0, scale: float | None = None, cap: float = 0.0
) -> None:
    scale = scale or tensors[0].shape[-1] ** -0.5
    expected = exact(tensors, documents, window, scale, cap)
    found = run(tensors, documents, window, scale, cap)
    with pytest.MonkeyPatch.context() as monkeypatch:
        choose(monkeypatch, "scalar")
        in_float32 = errors(run(tensors, documents, window, scale, cap), expected, tensors[3])
    for error, least in zip(errors(found, expected, tensors[3]), in_float32, strict=True):
        assert error < min(2 * least + ROUNDING, LIMIT), (error, least)
    torch.testing.assert_close(found[4].double(), expected[4], rtol=1e-5, atol=1e-5)


def whole(rows: int, tokens: int) -> Documents:
    return [[row, 0, tokens, 0, 0] for row in range(rows)]


PACKED = [[0, 0, 1, 0, 0], [0, 1, 34, 0, 0], [0, 34, 70, 0, 0], [1, 0, 69, 0, 0], [1, 69, 70, 0, 0]]
# a beginning, three that continue it, one on its own; in the second row two beginnings, and a prefix within one
SHARED = [
    [0, 0, 20, 0, 0], [0, 20, 30, 0, 20], [0, 30, 65, 0, 20], [0, 65, 66, 0, 20], [0, 66, 70, 0, 0],
    [1, 0, 3, 0, 0], [1, 3, 9, 0, 3], [1, 9, 40, 0, 3], [1, 40, 50, 0, 0], [1, 50, 58, 40, 50], [1, 58, 70, 2, 47],
]  # fmt: skip
LONG_PREFIX = [[0, 0, 200, 0, 0], *([0, 200 + 37 * n, 237 + 37 * n, 0, 200] for n in range(8))]
CASES = {
    "whole": (whole(2, 70), 2, 70),
    "packed": (PACKED, 2, 70),
    "shared": (SHARED, 2, 70),
    "long prefix": (LONG_PREFIX, 1, 496),
    "two lists": (whole(1, 600), 1, 600),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (1, 0.0), (33, 0.0), (250, 0.0), (0, 3.0), (9, 0.5)])
def test_layouts_windows_and_caps(each_set: str, case: str, window: int, cap: float) -> None:
    if each_set not in (*DOT_PRODUCTS, SETS[0]) and case == "two lists":
        pytest.skip("the generic kernel has no lists of queries")
    documents, rows, tokens = CASES[case]
    check(make(rows, tokens, 4, 2, 32), documents, window, scale=0.5 if cap else None, cap=cap)


@pytest.mark.parametrize("width", [1, 3, 20, 33, 64, 80, 96, 128, 200, 256])
def test_widths(dot_products: str, width: int) -> None:
    check(make(2, 70, 2, 1, width), SHARED)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 1), (9, 3), (17, 1), (40, 2)])
def test_heads(dot_products: str, heads: int, kv_heads: int) -> None:
    check(make(2, 70, heads, kv_heads, 16), SHARED, 11)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 65, 129, 257, 300])
def test_lengths(dot_products: str, tokens: int) -> None:
    check(make(1, tokens, 3, 1, 24), whole(1, tokens))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, Documents]:
    tokens, documents = 0, []
    for _ in range(draw(st.integers(1, 3))):
        prefix = draw(st.integers(0, 70))
        start = tokens
        if prefix:
            documents.append([0, tokens, tokens + prefix, 0, 0])
            tokens += prefix
        for _ in range(draw(st.integers(1, 3))):
            length = draw(st.integers(1, 90))
            documents.append([0, tokens, tokens + length, *((start, start + prefix) if prefix else (0, 0))])
            tokens += length
    return tokens, documents


@settings(
    deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip
@given(layouts(), st.integers(0, 120), st.sampled_from([(1, 1), (4, 2), (6, 2)]), st.sampled_from([5, 40]))
def test_any_layout(
    dot_products: str, layout: tuple[int, Documents], window: int, heads: tuple[int, int], width: int
) -> None:
    tokens, documents = layout
    check(make(1, tokens, *heads, width), documents, window)


def test_no_tokens_at_all(dot_products: str) -> None:
    found = run(make(1, 0, 2, 1, 16), [], 0, 1.0, 0.0)
    assert all(x.numel() == 0 for x in found)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales_that_turn_the_order_round(dot_products: str, scale: float) -> None:
    tensors = make(2, 70, 4, 2, 16)
    where = torch.tensor(SHARED, dtype=torch.int32)
    out, lse = native.attention(*tensors[:3], where, 0, scale)
    expected, expected_lse = reference.attention(*tensors[:3], where, 0, scale)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert float((out.double() - expected.double()).norm()) < LIMIT * float(expected.double().norm())


def test_strided_inputs(dot_products: str) -> None:
    tensors = make(2, 70, 4, 2, 24)
    where = torch.tensor(SHARED, dtype=torch.int32)
    expected = run(tensors, SHARED, 0, 0.2, 0.0)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    joined = torch.cat([x.flatten(2) for x in tensors], dim=-1)  # one product's columns, an odd number of elements on
    joined = torch.nn.functional.pad(joined, (1, 2))[..., 1:-2]
    sliced, column = [], 0
    for x in tensors:
        sliced.append(joined[..., column : column + x[0, 0].numel()].unflatten(-1, x.shape[2:]))
        column += x[0, 0].numel()
    for q, k, v, grad in (turned, sliced):
        out, lse = native.attention(q, k, v, where, 0, 0.2)
        grads = native.attention_backward(grad, q, k, v, out, lse, where, 0, 0.2)
        assert all(torch.equal(one, other) for one, other in zip((out, *grads, lse), expected, strict=True))


@pytest.mark.parametrize("documents", [whole(1, 496), LONG_PREFIX], ids=["whole", "long prefix"])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_every_thread_count_gives_the_same_bits(dot_products: str, documents: Documents, kv_heads: int) -> None:
    tensors = make(1, 496, 3, kv_heads, 32)
    results = []
    for count in (1, 1, 2, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(run(tensors, documents, 0, 0.2, 0.0))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_a_number_stays_in_its_document(dot_products: str) -> None:
    documents = [[0, 0, 30, 0, 0], [0, 30, 60, 0, 0], [0, 60, 75, 0, 30]]
    for bad in (float("nan"), float("inf")):
        for spoilt in range(3):
            tensors = make(1, 75, 2, 1, 16)
            tensors[spoilt][0, 10] = bad
            found = run(tensors, documents, 0, 0.2, 0.0)
            expected = exact(tensors, documents, 0, 0.2, 0.0)
            for one, other in zip(found, expected, strict=True):
                per_token = (one, other) if one.dim() == 4 else (one.transpose(1, 2), other.transpose(1, 2))
                ours, theirs = (x.isfinite().flatten(2).all(-1)[0] for x in per_token)
                assert ours[30:60].all()
                assert not (ours & ~theirs)[:10].any() or spoilt == 2
                assert torch.equal(ours[60:], theirs[60:]), (bad, spoilt)
            assert not found[0][0, 10].isfinite().any() or (bad == float("inf") and spoilt == 1)


def test_scores_of_any_size(dot_products: str) -> None:
    tensors = make(1, 50, 2, 1, 16, size=1e3)
    out, *_, lse = run(tensors, whole(1, 50), 0, 1.0, 0.0)
    expected, *_, expected_lse = exact(tensors, whole(1, 50), 0, 1.0, 0.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mutation", ["prefix", "window", "document"])
def test_what_is_off_by_one_would_show(dot_products: str, mutation: str) -> None:
    """The mutations that the gate must catch."""
    tensors, window = make(1, 75, 2, 1, 32), 20
    documents = [[0, 0, 30, 0, 0], [0, 30, 60, 0, 30], [0, 60, 75, 0, 0]]
    expected = exact(tensors, documents, window, 0.2, 0.0)
    if mutation == "window":
        window += 1
    elif mutation == "prefix":
        documents[1][3] = 15
        expected = exact(tensors, documents, window, 0.2, 0.0)
        documents[1][4] = 29
    else:
        documents[1][2] = documents[2][1] = 61
    found = errors(run(tensors, documents, window, 0.2, 0.0), expected, tensors[3])
    assert min(found) > 2 * LIMIT


def test_products_of_torch_and_ours_do_not_disturb_each_other(dot_products: str) -> None:
    """Both may use tiles in the same threads, each configured its own way."""
    torch.set_num_threads(2)
    tensors = make(2, 130, 4, 2, 64)
    shapes = [(64, 64, 64), (130, 70, 33), (7, 200, 90), (300, 512, 256), (16, 32, 16)]
    pairs = [(torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()) for m, k, n in shapes]
    alone = [a @ b for a, b in pairs]
    expected = run(tensors, whole(2, 130), 0, 0.2, 0.0)
    for _ in range(5):
        for (a, b), product in zip(pairs, alone, strict=True):
            assert torch.equal(a @ b, product)
            found = run(tensors, whole(2, 130), 0, 0.2, 0.0)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            assert torch.equal(a @ b, product)
    for (a, b), product in zip(pairs, alone, strict=True):
        torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=2e-2, atol=0.2)
