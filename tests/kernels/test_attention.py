"""Attention by documents against torch's own in float64 with an explicit mask, gradients by autograd of that."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitune.kernels import native, reference

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
BACKENDS = {"native": native, "reference": reference}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make(rows: int, tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens * 131 + width)
    shapes = [(rows, tokens, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def mask_of(documents: list[list[int]], row: int, tokens: int, window: int) -> Tensor:
    """[T, T] which keys a query sees: written token by token, from the meaning of documents alone."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for place, start, stop, prefix_start, prefix_stop in documents:
        if place != row:
            continue
        for query in range(start, stop):
            keys = [*range(prefix_start, prefix_stop), *range(start, query + 1)]
            mask[query, keys[-window:] if window else keys] = True
    return mask


def exact(
    tensors: tuple[Tensor, ...], documents: list[list[int]], window: int, scale: float, cap: float
) -> tuple[Tensor, ...]:  # fmt: skip
    q, k, v, grad = (x.double() for x in tensors)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    tokens = q.shape[1]
    masks = torch.stack([mask_of(documents, row, tokens, window) for row in range(q.shape[0])]).unsqueeze(1)
    if cap:
        keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
        scores = cap * torch.tanh(q.transpose(1, 2) @ keys.transpose(2, 3) * scale / cap)
        out = (scores.masked_fill(~masks, float("-inf")).softmax(-1) @ values).transpose(1, 2)
    else:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=masks, scale=scale, enable_gqa=True
        ).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def check(
    tensors: tuple[Tensor, ...], documents: list[list[int]], window: int = 0, scale: float = 0.2,
    backend: str = "native", cap: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    q, k, v, grad = tensors
    where = torch.tensor(documents, dtype=torch.int32)
    module = BACKENDS[backend]
    out, lse = module.attention(q, k, v, where, window, scale, cap)
    found = [out, *module.attention_backward(grad, q, k, v, out, lse, where, window, scale, cap)]
    for one, expected in zip(found, exact(tensors, documents, window, scale, cap), strict=True):
        assert one.dtype == q.dtype
        assert one.is_contiguous()
        # with a window of one token the gradients of queries and keys are exactly zero
        size = max(float(expected.norm()), 0.1 * float(grad.norm()))
        distance = float((one.double() - expected).norm()) / size
        assert distance < TOLERANCE[q.dtype], distance
    return found


WHOLE = [[0, 0, 70, 0, 0], [1, 0, 70, 0, 0]]
PACKED = [[0, 0, 1, 0, 0], [0, 1, 34, 0, 0], [0, 34, 70, 0, 0], [1, 0, 69, 0, 0], [1, 69, 70, 0, 0]]
# a beginning, three that continue it, one on its own; in the second row two beginnings
SHARED = [
    [0, 0, 20, 0, 0], [0, 20, 30, 0, 20], [0, 30, 65, 0, 20], [0, 65, 66, 0, 20], [0, 66, 70, 0, 0],
    [1, 0, 3, 0, 0], [1, 3, 9, 0, 3], [1, 9, 40, 0, 3], [1, 40, 50, 0, 0], [1, 50, 58, 40, 50], [1, 58, 70, 40, 50],
]  # fmt: skip
LAYOUTS = {"whole": WHOLE, "packed": PACKED, "shared": SHARED}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("window", [0, 1, 2, 7, 33, 1000])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_layouts_and_windows(dtype: torch.dtype, layout: str, window: int, backend: str) -> None:
    check(make(2, 70, 4, 2, 16, dtype), LAYOUTS[layout], window, backend=backend)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("cap", [0.5, 3.0, 50.0])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_bent_scores(dtype: torch.dtype, layout: str, cap: float, backend: str) -> None:
    check(make(2, 70, 4, 2, 16, dtype), LAYOUTS[layout], 9, scale=0.8, backend=backend, cap=cap)


def test_a_missing_cap_would_show() -> None:
    tensors = make(1, 40, 2, 1, 16, torch.float32)
    where = torch.tensor([[0, 0, 40, 0, 0]], dtype=torch.int32)
    bent, straight = (native.attention(*tensors[:3], where, 0, 0.8, cap)[0] for cap in (3.0, 0.0))
    assert float((bent - straight).norm()) > 0.01 * float(straight.norm())


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 1), (6, 2), (9, 3)])
@pytest.mark.parametrize("width", [1, 3, 20, 32, 33, 64, 80, 128])
def test_heads_and_widths(heads: int, kv_heads: int, width: int) -> None:
    check(make(2, 70, heads, kv_heads, width, torch.float32), SHARED, 0)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 65, 97])
def test_lengths(tokens: int) -> None:
    check(make(1, tokens, 2, 1, 24, torch.float32), [[0, 0, tokens, 0, 0]])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    tokens, documents = 0, []
    for _ in range(draw(st.integers(1, 4))):
        prefix = draw(st.integers(0, 20))
        start = tokens
        if prefix:
            documents.append([0, tokens, tokens + prefix, 0, 0])
            tokens += prefix
        for _ in range(draw(st.integers(1, 3))):
            length = draw(st.integers(1, 40))
            documents.append([0, tokens, tokens + length, *((start, start + prefix) if prefix else (0, 0))])
            tokens += length
    return tokens, documents


@settings(deadline=None, derandomize=True, max_examples=25)
@given(layouts(), st.integers(0, 50), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from([5, 16]))
def test_any_layout(layout: tuple[int, list[list[int]]], window: int, heads: tuple[int, int], width: int) -> None:
    tokens, documents = layout
    check(make(1, tokens, *heads, width, torch.float32), documents, window)


def test_a_window_shifted_by_one_is_another_result() -> None:
    """The mutation that these tolerances must catch."""
    tensors = make(1, 40, 2, 1, 16, torch.float32)
    where = torch.tensor([[0, 0, 40, 0, 0]], dtype=torch.int32)
    for window in (1, 7, 39):
        shifted = native.attention(*tensors[:3], where, window + 1, 0.2)[0]
        expected = exact(tensors, where.tolist(), window, 0.2, 0.0)[0]
        assert (shifted.double() - expected).norm() / expected.norm() > 100 * TOLERANCE[torch.float32]


def test_strided_inputs_and_lse() -> None:
    q, k, v, grad = make(2, 70, 4, 2, 16, torch.float32)
    where = torch.tensor(PACKED, dtype=torch.int32)
    out, lse = native.attention(q, k, v, where, 0, 0.2)
    grads = native.attention_backward(grad, q, k, v, out, lse, where, 0, 0.2)
    torch.testing.assert_close(lse, reference.attention(q, k, v, where, 0, 0.2)[1], rtol=1e-5, atol=1e-5)
    # as transformers hands them over: [B, H, T, D] turned round; and with a strided last dimension
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad)]
    split = [torch.stack([x, x], dim=-1)[..., 0] for x in (q, k, v, grad)]
    for a, b, c, g in (turned, split):
        assert torch.equal(native.attention(a, b, c, where, 0, 0.2)[0], out)
        for one, other in zip(native.attention_backward(g, a, b, c, out, lse, where, 0, 0.2), grads, strict=True):
            assert torch.equal(one, other)


def test_thread_counts_change_nothing_forward_and_only_rounding_backward() -> None:
    q, k, v, grad = make(1, 70, 6, 2, 16, torch.float32)
    where = torch.tensor([[0, 0, 70, 0, 0]], dtype=torch.int32)
    before = torch.get_num_threads()
    results = []
    for count in (1, 1, 2, 2, 3):
        torch.set_num_threads(count)
        out, lse = native.attention(q, k, v, where, 0, 0.2)
        results.append((out, lse, *native.attention_backward(grad, q, k, v, out, lse, where, 0, 0.2)))
    torch.set_num_threads(before)
    for one, other in ((0, 1), (2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(results[one], results[other], strict=True))
    for other in results[2:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))
        for a, b in zip(results[0][3:], other[3:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_not_a_number_stays_in_its_document() -> None:
    q, k, v, _ = make(1, 60, 2, 1, 16, torch.float32)
    where = torch.tensor([[0, 0, 30, 0, 0], [0, 30, 60, 0, 0]], dtype=torch.int32)
    for tensor in (q, k, v):
        spoilt = [x.clone() if x is tensor else x for x in (q, k, v)]
        next(x for x, y in zip(spoilt, (q, k, v), strict=True) if y is tensor)[0, 10] = float("nan")
        out = native.attention(*spoilt, where, 0, 0.2)[0]
        assert out[0, 10].isnan().all()
        assert out[0, 30:].isfinite().all()
        if tensor is not q:
            assert out[0, 10:30].isnan().any(dim=-1).all()


def test_scores_of_any_size() -> None:
    q, k, v, _ = make(1, 50, 2, 1, 16, torch.float32)
    out, lse = native.attention(q * 1e3, k * 1e3, v, torch.tensor([[0, 0, 50, 0, 0]], dtype=torch.int32), 0, 1.0)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize(
    "documents",
    [
        [[0, 0, 9, 0, 0]], [[1, 0, 8, 0, 0]], [[-1, 0, 8, 0, 0]], [[0, -1, 8, 0, 0]], [[0, 0, 7, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 8, 0, 0]], [[0, 0, 4, 2, 4], [0, 4, 8, 0, 0]], [[0, 0, 4, 0, 0], [0, 4, 8, -2, 4]],
        [[0, 0, 4, 0, 0], [0, 4, 8, 3, 2]], [[0, 0, 4, 0, 0], [0, 4, 8, 0, 6]],
    ],
)  # fmt: skip
def test_documents_outside_the_rows_are_refused(documents: list[list[int]]) -> None:
    q, k, v, _ = make(1, 8, 2, 1, 4, torch.float32)
    with pytest.raises(ValueError, match="documents"):
        native.attention(q, k, v, torch.tensor(documents, dtype=torch.int32), 0, 1.0)


def test_documents_that_were_good_are_looked_at_again_when_they_change() -> None:
    q, k, v, _ = make(1, 8, 2, 1, 4, torch.float32)
    documents = torch.tensor([[0, 0, 8, 0, 0]], dtype=torch.int32)
    native.attention(q, k, v, documents, 0, 1.0)
    with pytest.raises(ValueError, match="documents"):  # the same documents, of fewer tokens
        native.attention(q[:, :4], k[:, :4], v[:, :4], documents, 0, 1.0)
    documents[0, 2] = 9
    with pytest.raises(ValueError, match="documents"):
        native.attention(q, k, v, documents, 0, 1.0)


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    q, k, v, _ = make(1, 8, 4, 2, 4, torch.float32)
    where = torch.tensor([[0, 0, 8, 0, 0]], dtype=torch.int32)
    for bad in ((q, k, v[..., :2]), (q, k[:, :4], v[:, :4]), (q[:, :, :3], k, v), (q, k, v.bfloat16())):
        with pytest.raises(ValueError, match="attention of"):
            native.attention(*bad, where, 0, 1.0)
    with pytest.raises(ValueError, match="where it reads"):
        native.attention(q, k, v, where.long(), 0, 1.0)
