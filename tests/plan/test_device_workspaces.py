"""What operators take on a GPU beside their results, counted against numbers written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fitune.kernels import contract, products
from fitune.plan.device_workspaces import DeviceWorkspaces
from fitune.plan.live_bytes import LiveBytes
from fitune.quant.nf4 import DYNAMIC_MAP, NF4Weight, quantise

M, N, K = 8, 256, 128
ABSMAX = 4 * N * K // 64


def most_bytes(work: Callable[[], object], workspaces: bool) -> int:
    """Of results and workspaces alive at one time."""
    with LiveBytes() as live:
        if workspaces:
            with DeviceWorkspaces():
                kept = work()
        else:
            kept = work()
        del kept
    return live.peak


def beside_results(work: Callable[[], object]) -> int:
    """On fake tensors, where an operator makes its results and nothing else."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return most_bytes(work, True) - most_bytes(work, False)


def frozen(weight: NF4Weight) -> list[Tensor | None]:
    return [weight.codes, weight.absmax, weight.nested_absmax, None]


@pytest.fixture
def weight() -> NF4Weight:
    return quantise(torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16(), "reference")


def test_a_quantised_product_decodes_its_weight(weight: NF4Weight) -> None:
    x, grad = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(M, N, dtype=torch.bfloat16)
    one = ([0.0], [N], [None, None], DYNAMIC_MAP, "reference")
    assert beside_results(lambda: products.frozen_product(x, frozen(weight), *one)) == 2 * N * K + ABSMAX
    back = ([0.0], K, [None, None], DYNAMIC_MAP, "reference")
    found = beside_results(lambda: products.frozen_product_backward([grad], frozen(weight), *back))
    assert found == 2 * N * K + ABSMAX


def test_two_weights_are_decoded_one_after_the_other(weight: NF4Weight) -> None:
    x = torch.zeros(M, K, dtype=torch.bfloat16)
    two = ([0.0, 0.0], [N, N], [None] * 4, DYNAMIC_MAP, "reference")
    found = beside_results(lambda: products.frozen_product(x, [*frozen(weight), *frozen(weight)], *two))
    assert found == 2 * N * K + ABSMAX


def test_a_dense_weight_needs_nothing() -> None:
    x, dense = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(N, K, dtype=torch.bfloat16)
    one = ([0.0], [N], [None, None], DYNAMIC_MAP, "reference")
    assert beside_results(lambda: products.frozen_product(x, [dense, None, None, None], *one)) == 0


def test_a_decoded_weight_is_a_result_its_maxima_are_not(weight: NF4Weight) -> None:
    assert beside_results(lambda: weight.dense(torch.bfloat16, "reference")) == ABSMAX


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_sums_queries_gradients_in_float32_and_has_no_scores(kv_heads: int) -> None:
    rows, tokens, heads, width, documents = 2, 512, 4, 80, 3
    q = torch.zeros(rows, tokens, heads, width, dtype=torch.bfloat16)
    k = torch.zeros(rows, tokens, kv_heads, width, dtype=torch.bfloat16)
    lse, bounds = torch.zeros(rows, heads, tokens), torch.zeros(documents, 5, dtype=torch.int32)
    found = beside_results(
        lambda: contract.attention_backward(q, q, k, k, q, lse, bounds, 0, 0.1, 0.0, "reference")
    )  # fmt: skip
    padded = rows * tokens + 128 * documents
    expanded = 2 * 2 * rows * tokens * heads * width if kv_heads != heads else 0
    assert found == 4 * padded * heads * 96 + 4 * padded * heads + expanded
    assert beside_results(lambda: contract.attention(q, k, k, bounds, 0, 0.1, 0.0, "reference")) == 0
    assert found < 2 * rows * heads * tokens * tokens * 4  # scores and their gradient


def test_the_largest_decoded_weight_is_known(weight: NF4Weight) -> None:
    x = torch.zeros(M, K, dtype=torch.bfloat16)
    workspaces = DeviceWorkspaces()
    with workspaces:
        products.frozen_product(x, frozen(weight), [0.0], [N], [None, None], DYNAMIC_MAP, "reference")
    assert workspaces.largest_decoded == 2 * N * K + ABSMAX


def test_a_sharded_run_counts_no_copies_of_its_parameters() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    other = torch.zeros(1000)

    def copies() -> list[Tensor]:
        return [parameter.detach().to(torch.bfloat16), other.to(torch.bfloat16)]

    for sharded, expected in ((False, 4000), (True, 2000)):
        with LiveBytes() as live, DeviceWorkspaces(sharded):
            kept = copies()
            assert live.current == expected
        del kept
