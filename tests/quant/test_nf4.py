"""Our NF4 against bitsandbytes', bit for bit. One thread: its double-quantisation offset is a mean()."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitune.kernels import contract, native
from fitune.quant.nf4 import DYNAMIC_MAP, STATE_KEY, NF4Weight, quantise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [name for name in contract.BACKENDS if name != "native" or native.status().available]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def theirs(weight: Tensor) -> tuple[Tensor, QuantState]:
    return quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def decoded_by_them(codes: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """As one row: bitsandbytes 0.50.2 mixes up the blocks of matrices whose rows are no whole blocks (CPU)."""
    shape, state.dtype = state.shape, dtype
    state.shape = torch.Size([1, shape.numel()])
    dense = dequantize_4bit(codes.reshape(-1, 1), state).reshape(shape)
    state.shape = shape
    return dense


def assert_same_bits(weight: Tensor, backend: str) -> None:
    codes, state = theirs(weight)
    ours = quantise(weight, backend)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.tensor(ours.offset, dtype=torch.float32).equal(state.offset.float())
    for dtype in DTYPES:
        expected = decoded_by_them(codes, state, dtype)
        found = ours.dense(dtype, backend)
        assert found.dtype == dtype
        assert torch.equal(found, expected), dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (1, 64), (576, 192), (128, 160), (3, 5, 64), (300, 256)])
def test_every_number_is_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    assert_same_bits(weights(shape, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (3, 33), (5, 100), (33, 34), (1, 16400), (2, 1)])
def test_ragged_sizes(shape: tuple[int, ...], backend: str) -> None:
    for dtype in DTYPES:
        assert_same_bits(weights(shape, dtype), backend)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**20), st.sampled_from(DTYPES), st.floats(-8, 4))
def test_any_size_and_scale(rows: int, half: int, seed: int, dtype: torch.dtype, exponent: float) -> None:
    weight = (weights((rows, 2 * half), torch.float32, seed) * 10**exponent).clamp(-6e4, 6e4).to(dtype)
    for backend in BACKENDS:
        assert_same_bits(weight, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_weights(backend: str) -> None:
    one = weights((64, 64), torch.float32)
    one[:2] = 0
    one[5] = 1e4
    one[6, 3] = -1e-30
    assert_same_bits(one, backend)
    assert_same_bits(torch.full((4, 64), 0.25), backend)
    zero = quantise(torch.zeros(8, 64), backend)
    assert torch.equal(zero.dense(torch.float32, backend), torch.zeros(8, 64))


@pytest.mark.skipif(len(BACKENDS) < 2, reason=native.status().reason)
def test_both_backends_make_the_same_store() -> None:
    weight = weights((129, 130), torch.bfloat16)
    one, other = (quantise(weight, backend) for backend in BACKENDS)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.absmax, other.absmax)
    assert torch.equal(one.nested_absmax, other.nested_absmax)
    assert one.offset == other.offset


def test_rows_that_are_no_whole_blocks_come_back_near_what_they_were() -> None:
    weight = weights((128, 160), torch.float32)
    for backend in BACKENDS:
        error = (quantise(weight, backend).dense(torch.float32, backend) - weight).norm() / weight.norm()
        assert error < 0.1  # bitsandbytes 0.50.2 gives 0.26 here


def test_the_dynamic_type_is_bitsandbytes() -> None:
    _, state = theirs(weights((64, 64), torch.float32))
    assert torch.equal(DYNAMIC_MAP, state.state2.code)


@pytest.mark.parametrize("dtype", DTYPES)
def test_serialised_as_bitsandbytes_does_and_read_by_it(dtype: torch.dtype) -> None:
    weight = weights((96, 64), dtype)
    codes, state = theirs(weight)
    expected = state.as_dict(packed=True)
    ours = quantise(weight, BACKENDS[0])
    tensors = ours.serialised("w")
    assert set(tensors) == {"w", *(f"w.{name}" for name in expected)}
    assert torch.equal(tensors["w"], codes)
    for name, value in expected.items():
        if name != STATE_KEY:
            assert torch.equal(tensors[f"w.{name}"], value), name
            assert tensors[f"w.{name}"].dtype == value.dtype
    from bitsandbytes.utils import unpack_tensor_to_dict

    assert unpack_tensor_to_dict(tensors[f"w.{STATE_KEY}"]) == unpack_tensor_to_dict(expected[STATE_KEY])
    read = QuantState.from_dict({name.removeprefix("w."): v for name, v in tensors.items() if name != "w"}, "cpu")
    assert torch.equal(dequantize_4bit(tensors["w"], read), dequantize_4bit(codes, state))
    # and theirs by us
    back = NF4Weight.from_serialised("w", {"w": codes, **{f"w.{name}": value for name, value in expected.items()}})
    assert back.offset == ours.offset
    assert back.shape == (96, 64)
    assert back.dtype == dtype
    assert torch.equal(back.dense(dtype, BACKENDS[0]), dequantize_4bit(codes, state))


@pytest.mark.parametrize("settings_", [{"quant_type": "fp4"}, {"blocksize": 128}, {"compress_statistics": False}])
def test_another_layout_is_refused(settings_: dict[str, object]) -> None:
    arguments = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4", **settings_}
    codes, state = quantize_4bit(weights((64, 64), torch.float32), **arguments)
    tensors = {"w": codes, **{f"w.{name}": value for name, value in state.as_dict(packed=True).items()}}
    key = next(name for name in tensors if "quant_state" in name)
    tensors[f"w.{STATE_KEY}"] = tensors.pop(key)
    with pytest.raises(ValueError, match="not NF4 with double quantisation"):
        NF4Weight.from_serialised("w", tensors)


def test_size() -> None:
    ours = quantise(weights((1024, 1024), torch.bfloat16), BACKENDS[0])
    assert ours.size_bytes * 8 / 1024**2 == pytest.approx(4.127, abs=1e-3)
