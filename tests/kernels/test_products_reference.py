"""The products' meaning, and what "native" does on machines and in dtypes that have no native product."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_native import random

from fitune.kernels import native, products
from fitune.quant import nf4


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_operators_are_the_gradients_of_a_linear_layer_with_its_adapter(backend: str) -> None:
    if backend == "native" and not native.status().available:
        pytest.skip(native.status().reason)
    stored = nf4.quantise(random(12, 40), backend)
    weight, bias, scaling = stored.dense(torch.float32, backend), random(12, seed=1), 0.5
    a, b = (random(*shape, seed=seed).requires_grad_() for seed, shape in ((2, (3, 40)), (3, (12, 3))))
    x, grad = random(7, 40, seed=4).requires_grad_(), random(7, 12, seed=5)
    expected = x @ weight.t() + bias + scaling * (x @ a.t()) @ b.t()
    grads = torch.autograd.grad(expected, (x, a, b), grad)
    frozen = [stored.codes, stored.absmax, stored.nested_absmax, bias]
    factors = [a.detach(), b.detach() * scaling]
    y, u = products.frozen_product(x.detach(), frozen, [stored.offset], [12], factors, nf4.DYNAMIC_MAP, backend)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-5)
    grad_x, v = products.frozen_product_backward(
        [grad], frozen, [stored.offset], 40, factors, nf4.DYNAMIC_MAP, backend
    )
    found = (grad_x, *products.adapter_gradients([grad], x.detach(), [u], [v], [scaling], backend))
    for one, two in zip(found, grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    into = [random(*factor.shape, seed=9) for factor in factors]
    before = [tensor.clone() for tensor in into]
    products.adapter_gradients_([grad], x.detach(), into, [u], [v], [scaling], backend)
    for one, two, three in zip(into, before, grads[1:], strict=True):
        torch.testing.assert_close(one, two + three, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not native.status().available, reason=native.status().reason)
def test_an_instruction_set_without_dot_products_decodes_and_multiplies_with_torch() -> None:
    script = """
import torch
from fitune.kernels import products
from fitune.quant import nf4
stored = nf4.quantise(torch.randn(32, 64), "native")
x = torch.randn(4, 64).bfloat16()
frozen = [stored.codes, stored.absmax, stored.nested_absmax, None]
y, u = products.frozen_product(x, frozen, [stored.offset], [32], [None, None], nf4.DYNAMIC_MAP, "native")
print(products.natively_multiplied(torch.bfloat16), torch.equal(y, x @ stored.dense(torch.bfloat16, "native").t()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "FITUNE_INSTRUCTION_SET": "scalar"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
