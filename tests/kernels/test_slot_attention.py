"""Attention of one new token a row over slots, against the reference, and its bits against themselves."""

from __future__ import annotations

import pytest
import torch
from test_native import random
from torch import Tensor

from fitune.kernels import contract, native

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Slots:
    """Rows at columns of their own; what lies beyond a row's column is not finite, and must not be seen."""

    def __init__(self, columns: list[int], heads: int = 6, kv_heads: int = 2, width: int = 64, shared: int = 0,
                 dtype: torch.dtype = torch.bfloat16, spare: int = 2) -> None:  # fmt: skip
        rows, self.shared = len(columns), shared
        capacity = max([*columns, 0]) + 3
        self.columns = torch.tensor(columns, dtype=torch.long)
        self.q = random(rows, heads, width, dtype=dtype, seed=1)
        self.k, self.v = (random(rows, kv_heads, width, dtype=dtype, seed=seed) for seed in (2, 3))
        self.keys, self.values = (
            random(rows + spare, kv_heads, capacity, width, dtype=dtype, seed=seed) for seed in (4, 5)
        )
        for cached in (self.keys, self.values):
            cached[:, :, :shared] = cached[:1, :, :shared].clone()
            for row, column in enumerate(columns):
                cached[row, :, column:] = float("nan")

    def run(self, backend: str, window: int = 0, scale: float = 0.125, cap: float = 0.0) -> tuple[Tensor, ...]:
        keys, values = self.keys.clone(), self.values.clone()
        out = contract.slot_attention_(
            self.q, self.k, self.v, keys, values, self.columns, self.shared, window, scale, cap, backend
        )
        return out, keys, values


def check(slots: Slots, **settings: float) -> None:
    out, keys, values = slots.run("native", **settings)
    expected, their_keys, their_values = slots.run("reference", **settings)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[slots.q.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(keys, their_keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, their_values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [[], [0], [5, 0, 63, 64], [200, 3, 127, 128, 129, 64, 65, 66, 67, 68, 300]])
def test_rows_at_any_column(columns: list[int], dtype: torch.dtype, threads: int) -> None:
    check(Slots(columns, dtype=dtype))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(1, 1, 1), (4, 4, 80), (9, 3, 64), (8, 1, 256), (5, 5, 33), (16, 2, 128)]
)
def test_any_shape_of_heads(heads: int, kv_heads: int, width: int) -> None:
    for dtype in DTYPES:
        check(Slots([70, 0, 130], heads, kv_heads, width, dtype=dtype), scale=width**-0.5)


@pytest.mark.parametrize("shared", [1, 63, 64, 100, 128, 192])
def test_a_shared_beginning_is_read_from_the_first_slot(shared: int, threads: int) -> None:
    slots = Slots([shared + extra for extra in (0, 1, 70, 5, 64, 63, 9, 10, 11, 12)], shared=shared)
    check(slots)
    whole = slots.run("native")[0]
    slots.keys[1:, :, : shared // 64 * 64] = float("nan")
    assert torch.equal(slots.run("native")[0], whole)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 1000])
def test_a_window(window: int) -> None:
    check(Slots([0, 1, 62, 63, 64, 200], shared=0), window=window)
    check(Slots([130, 200], shared=128), window=window)


def test_a_cap_bends_the_scores() -> None:
    slots = Slots([40, 100])
    check(slots, cap=1.5, scale=0.3)
    assert not torch.allclose(slots.run("native", cap=1.5, scale=0.3)[0], slots.run("native", scale=0.3)[0])


def test_neither_other_rows_nor_threads_change_a_bit() -> None:
    slots = Slots([100, 64, 190, 70, 128, 99, 80, 81, 82, 83], shared=64)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(slots.run("native")[0])
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = Slots([100], shared=64)
    for name in ("q", "k", "v", "keys", "values"):
        setattr(alone, name, getattr(slots, name)[5:6].contiguous())
    alone.columns = slots.columns[5:6]
    assert torch.equal(alone.run("native")[0][0], results[0][5])


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(odd: float) -> None:
    slots = Slots([80, 70, 90])
    slots.keys[1, 0, 7, 3] = odd
    out = slots.run("native")[0]
    assert torch.equal(out.isfinite(), slots.run("reference")[0].isfinite())
    assert not out[1, :3].isfinite().all()
    assert out[1, 3:].isfinite().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("change", ["query", "key", "value", "old key", "column", "scale"])
def test_a_wrong_operand_is_noticed(change: str) -> None:
    slots = Slots([80, 70, 90])
    expected = slots.run("reference")[0]
    scale = 0.125
    if change == "scale":
        scale = 0.13
    elif change == "column":
        slots.columns = slots.columns - 1
    elif change == "old key":
        slots.keys[:, :, 0] = 0
    else:
        name = change[0]
        setattr(slots, name, getattr(slots, name).roll(1, 0))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(slots.run("native", scale=scale)[0], expected, rtol=1e-2, atol=1e-2)


def test_operands_that_do_not_fit_are_refused() -> None:
    slots = Slots([4, 5])
    slots.columns = torch.tensor([4, 8])
    with pytest.raises(IndexError, match="slots of 8"):
        slots.run("native")
    slots.columns = torch.tensor([4, 5])
    slots.shared = 5
    with pytest.raises(IndexError, match="the first 5 of them shared"):
        slots.run("native")
    slots.shared = 0
    for name, value in (("k", slots.k[:, :1]), ("q", slots.q[:, :5]), ("v", slots.v.float()), ("q", slots.q[:1])):
        kept = getattr(slots, name)
        setattr(slots, name, value)
        with pytest.raises(ValueError, match=r"native kernel|queries"):
            slots.run("native")
        setattr(slots, name, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 31, 5000, 70000])
def test_add_scaled_has_the_bits_of_the_reference(n: int, dtype: torch.dtype) -> None:
    x, y = random(n, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    assert torch.equal(contract.add_scaled(x, y, 1.0, "native"), x + y)
    for scale in (0.7, -3.0):
        found = contract.add_scaled(x, y, scale, "native")
        assert torch.equal(found, contract.add_scaled(x, y, scale, "reference"))
