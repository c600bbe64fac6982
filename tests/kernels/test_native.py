"""Every native operator against the reference, on every instruction set that this machine has."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_passes_with, available_sets
from torch import Tensor

from fitune.kernels import contract, native, reference
from fitune.quant import moments, nf4

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place of a result around 1, with room for another order of summation.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ACTIVATIONS = list(native.ACTIVATIONS)
OPERATORS = [name if hasattr(contract, name) else f"{name}_" for name in native._SIGNATURES]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=2 * tolerance, atol=2 * tolerance, equal_nan=True
    )


def misaligned(tensor: Tensor) -> Tensor:
    """The same values one element past an aligned address, as tensors of a mapped file may lie."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = room[1:].view(tensor.shape)
    assert view.data_ptr() % 16
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 127, 128, 1000, 16384, 16385, 40000])
def test_nf4_quantise_has_the_bits_of_the_reference(dtype: torch.dtype, n: int, threads: int) -> None:
    weight = random(n, dtype=dtype, seed=n)
    weight[::7] = 0
    if n >= 128:
        weight[64:128] = 0
    for found, expected in zip(native.nf4_quantise(weight), reference.nf4_quantise(weight), strict=True):
        assert torch.equal(found, expected)
    if n:
        codes, absmax = native.nf4_quantise(misaligned(weight))
        assert torch.equal(codes, reference.nf4_quantise(weight)[0])
        assert torch.equal(absmax, reference.nf4_quantise(weight)[1])


def test_nf4_quantise_takes_strided_weights() -> None:
    weight = random(33, 40).t()
    assert torch.equal(native.nf4_quantise(weight)[0], native.nf4_quantise(weight.contiguous())[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 4096, 64 * 256 + 64, 40001])
def test_nf4_dequantise_has_the_bits_of_the_reference(dtype: torch.dtype, n: int, threads: int) -> None:
    weight = nf4.quantise(random(n, seed=n, scale=0.02), "reference")
    tensors = weight.codes, weight.absmax, weight.nested_absmax, nf4.DYNAMIC_MAP
    expected = reference.nf4_dequantise(*tensors, weight.offset, [n], dtype)
    assert torch.equal(native.nf4_dequantise(*tensors, weight.offset, [n], dtype), expected)
    moved = (misaligned(weight.codes), misaligned(weight.absmax), weight.nested_absmax, nf4.DYNAMIC_MAP)
    assert torch.equal(native.nf4_dequantise(*moved, weight.offset, [n], dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (1, 7), (3, 64), (2, 5, 576), (5, 33), (1, 4097)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], shift: float, threads: int) -> None:
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight = random(shape[-1], dtype=dtype, seed=2)
    out, rstd = native.rms_norm(x, weight, 1e-5, shift)
    expected, expected_rstd = reference.rms_norm(x, weight, 1e-5, shift)
    assert_close(rstd, expected_rstd, torch.float32)
    assert_close(out, expected, dtype)
    back = native.rms_norm_backward(grad, x, weight, rstd, None, shift)
    assert_close(back, reference.rms_norm_backward(grad, x, weight, rstd, None, shift), dtype)
    added = native.rms_norm_backward(grad, x, weight, rstd, x, shift)
    assert_close(added, reference.rms_norm_backward(grad, x, weight, rstd, x, shift), dtype)
    if x.numel():
        assert torch.equal(native.rms_norm(misaligned(x), misaligned(weight), 1e-5, shift)[0], out)
        strided = torch.cat([x, x], dim=-1)[..., : shape[-1]]
        assert torch.equal(native.rms_norm(strided, weight, 1e-5, shift)[0], out)
        assert torch.equal(native.rms_norm_backward(grad, strided, weight, rstd, strided, shift), added)


def test_rms_norm_backward_is_the_gradient() -> None:
    x = random(3, 37).double().requires_grad_()
    weight, grad = random(37, seed=1), random(3, 37, seed=2)
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + weight.double())
    (expected,) = torch.autograd.grad(out, x, grad.double())
    narrow = x.detach().float()
    rstd = native.rms_norm(narrow, weight, 1e-5, 1.0)[1]
    assert_close(native.rms_norm_backward(grad, narrow, weight, rstd, None, 1.0), expected.float(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [0, 1, 17, 4096, 4097, 10001])
def test_gated_activation(dtype: torch.dtype, activation: str, n: int, threads: int) -> None:
    gate, up, grad = (random(n, dtype=dtype, seed=seed, scale=3.0) for seed in range(3))
    assert_close(
        native.gated_activation(gate, up, activation), reference.gated_activation(gate, up, activation), dtype
    )
    found = native.gated_activation_backward(grad, gate, up, activation)
    expected = reference.gated_activation_backward(grad, gate, up, activation)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, dtype)
    if n:
        assert torch.equal(native.gated_activation(misaligned(gate), misaligned(up), activation),
                           native.gated_activation(gate, up, activation))  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_is_torchs_own(activation: str) -> None:
    gate = torch.linspace(-40, 40, 4001, dtype=torch.float64).requires_grad_()
    up, grad = random(4001, seed=1), random(4001, seed=2)
    torchs = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(
        gate, approximate="tanh")  # fmt: skip
    (slope,) = torch.autograd.grad(torchs * up.double(), gate, grad.double())
    narrow = gate.detach().float()
    assert_close(
        native.gated_activation(narrow, up, activation), (torchs.detach() * up.double()).float(), torch.float32
    )
    found = native.gated_activation_backward(grad, narrow, up, activation)[0]
    torch.testing.assert_close(found, slope.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 2), (3, 15), (4, 16), (5, 17), (2, 1001)])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_token_logprob(dtype: torch.dtype, shape: tuple[int, int], with_gradient: bool, threads: int) -> None:
    logits = random(*shape, dtype=dtype, scale=5.0)
    targets = torch.randint(shape[1], (shape[0],), generator=torch.Generator().manual_seed(3))
    ours, theirs = logits.clone(), logits.clone()
    found = native.token_logprob_(ours, targets, with_gradient)
    expected = reference.token_logprob_(theirs, targets, with_gradient)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_close(ours, theirs, dtype)
    if not with_gradient:
        assert torch.equal(ours, logits)


def test_token_logprob_gradient_is_autograds() -> None:
    logits = random(4, 50, scale=3.0)
    targets = torch.tensor([0, 49, 7, 7])
    wide = logits.double().requires_grad_()
    chosen = wide.log_softmax(-1).gather(1, targets.unsqueeze(1)).sum()
    (expected,) = torch.autograd.grad(chosen, wide)
    native.token_logprob_(logits, targets, True)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "half"), [(1, 2, 1), (3, 64, 32), (2, 20, 5), (4, 33, 16)])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotate(dtype: torch.dtype, heads: int, width: int, half: int, inverse: bool, threads: int) -> None:
    x = random(5, heads, width, dtype=dtype)
    angle = random(5, half, seed=1)
    found = native.rotate(x, angle.cos(), angle.sin(), inverse)
    assert_close(found, reference.rotate(x, angle.cos(), angle.sin(), inverse), dtype)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(native.rotate(strided, angle.cos(), angle.sin(), inverse), found)
    in_place = x.clone()
    native.rotate_(in_place, angle.cos(), angle.sin(), inverse)
    assert torch.equal(in_place, found)
    if heads > 1:
        with pytest.raises(ValueError, match="strided"):
            native.rotate_(strided, angle.cos(), angle.sin(), inverse)
    if dtype == torch.float32:
        torch.testing.assert_close(native.rotate(found, angle.cos(), angle.sin(), not inverse), x, rtol=0, atol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 3), st.integers(1, 70), st.integers(0, 2**16), st.sampled_from(DTYPES))
def test_any_shape_agrees(rows: int, width: int, seed: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, width, dtype=dtype, seed=seed), random(width, dtype=dtype, seed=seed + 1)
    assert_close(native.rms_norm(x, weight, 1e-6, 0.0)[0], reference.rms_norm(x, weight, 1e-6, 0.0)[0], dtype)
    for activation in ACTIVATIONS:
        found = native.gated_activation(x, x.flip(0), activation)
        assert_close(found, reference.gated_activation(x, x.flip(0), activation), dtype)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_where_the_reference_has_it(odd: float) -> None:
    x, weight = random(3, 40), random(40, seed=1)
    x[1, 5] = odd
    found, expected = native.rms_norm(x, weight, 1e-5, 0.0)[0], reference.rms_norm(x, weight, 1e-5, 0.0)[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[[0, 2]].isfinite().all()
    for activation in ACTIVATIONS:
        found, expected = (m.gated_activation(x, x.flip(0), activation) for m in (native, reference))
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())
        for one, other in zip(*(m.gated_activation_backward(x, x, x, activation) for m in (native, reference)),
                              strict=True):  # fmt: skip
            assert torch.equal(one.isfinite(), other.isfinite())
    logits = [x.clone() for _ in range(2)]
    targets = torch.tensor([0, 1, 2])
    found, expected = (
        m.token_logprob_(one, targets, True) for m, one in zip((native, reference), logits, strict=True)
    )
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(logits[0].isnan(), logits[1].isnan())


def test_results_are_the_same_from_run_to_run_and_for_any_thread_count() -> None:
    x, weight = random(50, 777, dtype=torch.bfloat16), random(777, dtype=torch.bfloat16, seed=1)
    targets = torch.arange(50)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        out, rstd = native.rms_norm(x, weight, 1e-5, 0.0)
        logits = x.clone()
        results.append((out, rstd, native.rms_norm_backward(x, x, weight, rstd, None, 0.0),
                        *native.gated_activation_backward(x, x, out, "silu"),
                        native.token_logprob_(logits, targets, True), logits, *native.nf4_quantise(x)))  # fmt: skip
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_exponential_is_exact_to_rounding_over_its_range() -> None:
    # softmax of (0, x): the gradient of the first one's log-probability at the second is -e^x / (1 + e^x)
    x = -torch.cat([torch.linspace(0, 87.2, 200_001), torch.logspace(-8, 0, 1001)])
    logits = torch.stack([torch.zeros_like(x), x], dim=1)
    native.token_logprob_(logits, torch.zeros(len(x), dtype=torch.int64), True)
    exact = x.double().exp() / (1 + x.double().exp())
    error = (-logits[:, 1].double() - exact).abs() / exact
    assert error.max() < 4e-7
    far = torch.tensor([[0.0, -104.0], [0.0, -1e30], [0.0, -float("inf")]])
    native.token_logprob_(far, torch.zeros(3, dtype=torch.int64), True)
    assert far[:, 1].tolist() == [0.0, 0.0, 0.0]


def test_native_code_refuses_what_it_would_misread() -> None:
    x, weight = random(4, 8), random(8)
    rstd = torch.ones(4)
    with pytest.raises(ValueError, match="bfloat16 where it reads"):
        native.rms_norm_backward(x.bfloat16(), x, weight, rstd, None, 0.0)
    with pytest.raises(ValueError, match="where it reads"):
        native.rms_norm(x, random(7), 1e-5, 0.0)
    with pytest.raises(ValueError, match="where it reads"):
        native.gated_activation(x, x[:2], "silu")
    with pytest.raises(ValueError, match="strided"):
        native.token_logprob_(random(8, 4).t(), torch.zeros(4, dtype=torch.int64), True)
    with pytest.raises(ValueError, match="int32 where it reads"):
        native.token_logprob_(x, torch.zeros(4, dtype=torch.int32), True)
    for target in (-1, 8):
        with pytest.raises(IndexError, match="outside the vocabulary of 8"):
            native.token_logprob_(x, torch.tensor([0, 0, target, 0]), False)
    one = nf4.quantise(random(128), "native")
    with pytest.raises(ValueError, match="codes for 256 weights"):
        native.nf4_dequantise(one.codes, one.absmax, one.nested_absmax, nf4.DYNAMIC_MAP, 0.0, [256], torch.float32)
    with pytest.raises(ValueError, match="bfloat16 where it reads"):  # what model.to(bfloat16) makes
        native.nf4_dequantise(
            one.codes, one.absmax, one.nested_absmax.bfloat16(), nf4.DYNAMIC_MAP, 0.0, [128], torch.float32
        )
    with pytest.raises(ValueError, match="columns to rotate"):
        native.rotate(random(2, 1, 6), torch.ones(2, 4), torch.ones(2, 4), False)
    with pytest.raises(KeyError):
        native.gated_activation(x, x, "relu")
    with pytest.raises(ValueError, match="no gated activation"):
        reference.gated_activation(x, x, "relu")


def operands(name: str) -> list[tuple[object, ...]]:
    """Arguments to call an operator with."""
    x, weight = random(3, 10), random(10)
    quantised = nf4.quantise(random(130), "reference")
    slots = random(8, 2, 9, 8)
    q, k = random(1, 6, 4, 8), random(1, 6, 2, 8, seed=1)
    documents = torch.tensor([[0, 0, 4, 0, 0], [0, 4, 6, 0, 2]], dtype=torch.int32)
    out, lse = reference.attention(q, k, k, documents, 0, 0.3)
    return {
        "nf4_quantise": [(random(130),), (random(4, 64, dtype=torch.bfloat16),)],
        "nf4_dequantise": [
            (quantised.codes, quantised.absmax, quantised.nested_absmax, nf4.DYNAMIC_MAP, quantised.offset, shape, d)
            for d in DTYPES for shape in ([130], [13, 10])
        ],
        "rms_norm": [(x, weight, 1e-5, 1.0), (x.bfloat16(), weight, 1e-5, 0.0)],
        "rms_norm_backward": [(x, x, weight, torch.ones(3), None, 0.0), (x, x, weight, torch.ones(3), x, 0.0)],
        "gated_activation": [(x, x, "silu"), (x.bfloat16(), x.bfloat16(), "gelu_tanh")],
        "gated_activation_backward": [(x, x, x, "silu")],
        "token_logprob_": [(x.clone(), torch.tensor([1, 2, 3]), with_gradient) for with_gradient in (False, True)],
        "rotate_": [(random(4, 2, 8), torch.ones(4, 3), torch.zeros(4, 3), True)],
        "attention": [(q, k, k, documents, 0, 0.3, 0.0), (q, k, k, documents, 2, 0.3, 5.0)],
        "attention_backward": [(q, q, k, k, out, lse, documents, 0, 0.3, 0.0)],
        "slot_attention_": [(q[0], k[0], k[0], slots, slots.clone(), torch.arange(q.shape[1]), 0, 0, 0.3, 0.0)],
        "add_scaled": [(x, x, 0.5)],
        "adamw8bit_": [
            (
                random(300), random(300, seed=1), *torch.zeros(2, 300, dtype=torch.uint8).unbind(),
                *torch.zeros(2, 2).unbind(), *moments.MAPS, [0.9, 0.1, 0.99, 0.01, 1e-8, 1.0, 1e-3, 0.1],
            )
        ],
    }[name]  # fmt: skip


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_schema_and_fake_are_what_the_operator_does(name: str, backend: str) -> None:
    operator = getattr(contract, name)
    for arguments in operands(name):
        torch.library.opcheck(operator, (*arguments, backend), test_utils=("test_schema", "test_faketensor"))


def test_fake_tensors_never_reach_native_code() -> None:
    # In a process of its own: reading address zero would end it.
    script = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from fitune.kernels import contract
with FakeTensorMode():
    x, w = torch.empty(8, 64), torch.empty(64)
    out, rstd = contract.rms_norm(x, w, 1e-5, 0.0, "native")
    contract.rms_norm_backward(x, x, w, rstd, None, 0.0, "native")
    contract.gated_activation_backward(x, x, x, "silu", "native")
    contract.token_logprob_(x, torch.empty(8, dtype=torch.int64), True, "native")
    codes, absmax = contract.nf4_quantise(x, "native")
    n = torch.empty(1, dtype=torch.float32)
    contract.nf4_dequantise(codes, torch.empty(8, dtype=torch.uint8), n, torch.empty(256), 0.0, [8, 64],
                            torch.bfloat16, "native")
    q = torch.empty(1, 8, 2, 64)
    d = torch.empty(1, 5, dtype=torch.int32)
    o, lse = contract.attention(q, q, q, d, 0, 1.0, 0.0, "native")
    print([tuple(g.shape) for g in contract.attention_backward(o, q, q, q, o, lse, d, 0, 1.0, 0.0, "native")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(1, 8, 2, 64), (1, 8, 2, 64), (1, 8, 2, 64)]"


@pytest.mark.parametrize("name", available_sets()[1:])
def test_the_other_instruction_sets_pass_the_same_tests(name: str) -> None:
    assert_passes_with(name, ["schema"], "test_native.py", "test_attention.py", "test_slot_attention.py")


def test_an_instruction_set_that_cannot_run_here_is_refused_with_those_that_can() -> None:
    script = "from fitune.kernels import native; print(native.status())"
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "FITUNE_INSTRUCTION_SET": "sse9"},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "available=False" in done.stdout
    assert "FITUNE_INSTRUCTION_SET=sse9 cannot run here" in done.stdout
    assert "scalar" in done.stdout


def test_unknown_names_have_no_table() -> None:
    library = ctypes.CDLL(native.status().path)
    library.fitune_kernels.restype = ctypes.c_void_p
    for name in (b"", b"avx", b"scalar ", b"512"):
        assert library.fitune_kernels(name) is None
    assert library.fitune_kernels(b"scalar") is not None
