"""Every part can be taken away from outside, what is left computes the same; torch's attention is the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import ablation
import pytest
import speed_switches
import speed_torch_attention
import torch
from speed_inputs import Inputs, write_run_file
from speed_switches import SWITCHES, Switch, switch_off
from speed_worker import Fitune
from tiny_case import TINY_CASE, tiny_inputs

from fitune.kernels import native, products, reference

# bfloat16 rounds a loss of 4.6 in other places.
LOSS_TOLERANCE = 0.02
PATCHED = [switch for switch in SWITCHES if not switch.environment and switch.recompute == "none"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))


def side(inputs: Inputs) -> Fitune:
    run_file = inputs.scratch / "run.yaml"
    write_run_file(
        TINY_CASE, inputs.model, inputs.data, run_file, compute="bfloat16", recompute="none", threads=1
    )  # fmt: skip
    return Fitune(run_file, json.loads(inputs.steps.read_text()), None)


def parts(one: Fitune) -> set[str]:
    return {part for part, count in one.report["replaced"].items() if count}


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], list[float]]:
    """What is replaced, and two losses, with everything on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FITUNE_CACHE", str(tmp_path_factory.mktemp("store")))
        one = side(inputs)
        return parts(one), [one.step(number)[0] for number in range(2)]


def test_everything_is_on_to_begin_with(whole: tuple[set[str], list[float]]) -> None:
    assert whole[0] == {"linear", "norm", "mlp", "attention", "layer", "head"}


@pytest.mark.parametrize("switch", PATCHED, ids=[switch.name for switch in PATCHED])
def test_a_part_is_taken_away_and_the_rest_computes_the_same(
    switch: Switch, inputs: Inputs, whole: tuple[set[str], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = switch.obstacle()
    if reason is not None:
        pytest.skip(reason)
    switch_off(switch.name, monkeypatch.setattr)
    one = side(inputs)
    assert whole[0] - parts(one) == switch.lost
    losses = [one.step(number)[0] for number in range(2)]
    assert losses == pytest.approx(whole[1], abs=LOSS_TOLERANCE)


def test_products_without_the_native_ones_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    switch_off(speed_switches.PRODUCTS, monkeypatch.setattr)
    assert not products.natively_multiplied(torch.bfloat16)


def test_only_attention_comes_from_the_older_set(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = next(switch for switch in SWITCHES if switch.name == speed_switches.BFLOAT16_ATTENTION)
    if switch.obstacle() is not None:
        pytest.skip(switch.obstacle() or "")
    best, _, library = native._load()
    older = library.fitune_kernels(speed_switches.OLDER.encode()).contents
    switch.apply(monkeypatch.setattr)
    found = native._table()

    def address(function: object) -> int:
        return int.from_bytes(bytes(function), "little")  # type: ignore[call-overload]

    assert address(found.attention_backward) == address(older.attention_backward) != address(best.attention_backward)
    assert address(found.rms_norm) == address(best.rms_norm)
    assert products.natively_multiplied(torch.bfloat16)


@pytest.mark.parametrize("documents", [[[0, 0, 40], [1, 0, 40]], [[0, 0, 13], [0, 13, 40], [1, 0, 40]]])
def test_torchs_attention_is_that_of_the_reference(documents: list[list[int]]) -> None:
    draw = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 40, 4, 16, generator=draw) for _ in range(2))
    k, v = (torch.randn(2, 40, 2, 16, generator=draw) for _ in range(2))
    bounds = torch.tensor([[*one, 0, 0] for one in documents], dtype=torch.int32)
    settings = (bounds, 0, 0.25, 0.0)
    out, lse = speed_torch_attention.attention(q, k, v, *settings, "native")
    expected, expected_lse = reference.attention(q, k, v, *settings)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    found = speed_torch_attention.attention_backward(grad, q, k, v, out, lse, *settings, "native")
    truth = reference.attention_backward(grad, q, k, v, expected, expected_lse, *settings)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("window", "cap", "prefix"), [(8, 0.0, 0), (0, 30.0, 0), (0, 0.0, 4)])
def test_torchs_attention_refuses_what_it_does_not_know(window: int, cap: float, prefix: int) -> None:
    x = torch.zeros(1, 8, 1, 16)
    bounds = torch.tensor([[0, 0, 4, 0, 0], [0, 4, 8, 0, prefix]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="knows no windows"):
        speed_torch_attention.attention(x, x, x, bounds, window, 1.0, cap, "native")


def test_rows_say_what_their_part_alone_is_worth() -> None:
    names = [switch.name for switch in SWITCHES]
    assert all(switch.beside in names[: names.index(switch.name)] for switch in SWITCHES if switch.beside)
    rows = [
        ablation.Row("a", speed_ratio=0.8),
        ablation.Row("b", speed_ratio=0.6, beside="a"),
        ablation.Row("c", speed_ratio=0.5, beside="gone"),
        ablation.Row("d", beside="a", problem="failed:\nwhy"),
    ]
    ablation.set_part_ratios(rows)
    assert [row.part_ratio for row in rows] == [None, pytest.approx(0.75), None, None]
    assert ablation.row_cells(rows[3]) == ["d", *["-"] * 6, "failed: why"]
    assert len(ablation.row_cells(rows[3])) == len(ablation.COLUMNS)
    assert json.loads(json.dumps(rows[1].as_json()))["part_ratio"] == pytest.approx(0.75)


def test_rows_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert ablation.parse(["--rows", "fused MLP,fused head", "--quick"]).rounds == ablation.QUICK_ROUNDS
    with pytest.raises(SystemExit):
        ablation.parse(["--rows", "luck"])
    assert "no part called luck" in capsys.readouterr().err
