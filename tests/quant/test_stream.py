"""Weights that come and go: the same numbers, in the order that layers are reached in, whoever carries them."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fitune.errors import FituneError
from fitune.process_memory import resident_bytes
from fitune.quant.direct_reads import DirectReads, NoDirectReadsError
from fitune.quant.linear import QuantisedLinear
from fitune.quant.mapped_pages import MappedPages, is_mapped, spans_of
from fitune.quant.nf4 import NF4Weight, quantise
from fitune.quant.parameter import QuantisedParameter, StoredTensors
from fitune.quant.staged_copies import StagedCopies
from fitune.quant.stream import Carrier, LayerStream, layer_groups, layer_number, resident_groups

LAYERS = 5


def _stored(folder: Path, name: str, weight: torch.Tensor) -> NF4Weight:
    """Quantised, written, and mapped."""
    path = folder / f"{name}.safetensors"
    save_file(quantise(weight, "reference").serialised("w"), path)
    file = safe_open(path, framework="pt")
    return NF4Weight.from_serialised("w", {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def _model(folder: Path, out: int = 96, width: int = 64) -> nn.Module:
    """Layers of two mapped linears each."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList()
    for number in range(LAYERS):
        layer = nn.Module()
        layer.up = QuantisedLinear(
            _stored(folder, f"up{number}", torch.randn(out, width, generator=generator)), None, "reference"
        )
        layer.down = QuantisedLinear(
            _stored(folder, f"down{number}", torch.randn(width, out, generator=generator)), None, "reference"
        )
        model.layers.append(layer)
    return model


def _pass(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        x = x + layer.down(layer.up(x).tanh())
    return x


class Noted:
    """A carrier that has everything, and notes what it is asked for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def fetch(self, group: int) -> None:
        self.asked.append(("fetch", group))

    def wait(self, group: int) -> None:
        self.asked.append(("wait", group))

    def drop(self, group: int) -> None:
        self.asked.append(("drop", group))

    def release(self) -> None:
        self.asked.append(("release", -1))

    def tensors(self, parameter: QuantisedParameter) -> StoredTensors:
        return parameter.own_tensors()


def direct_reads(groups: Sequence[Sequence[QuantisedParameter]]) -> DirectReads:
    try:
        return DirectReads(groups)
    except NoDirectReadsError as error:
        pytest.skip(str(error))


def _visit(stream: LayerStream, groups: Sequence[Sequence[QuantisedParameter]], order: Sequence[int]) -> None:
    for number in order:
        for parameter in groups[number]:
            stream.reach(parameter)


@pytest.mark.parametrize("resident", [0, 2, LAYERS])
@pytest.mark.parametrize(
    "carrier",
    [MappedPages, direct_reads, lambda groups: StagedCopies(groups, "cpu")],
    ids=["mapped", "direct", "staged"],
)
def test_results_and_gradients_are_the_same_to_the_bit(carrier: type, resident: int, tmp_path: Path) -> None:
    model = _model(tmp_path)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before = _pass(model, x)
    (grad_before,) = torch.autograd.grad(before.square().sum(), x)
    groups = layer_groups(model)
    stream = LayerStream(groups, carrier(groups), resident)
    for _ in range(3):
        after = _pass(model, x)
        (grad_after,) = torch.autograd.grad(after.square().sum(), x)
        assert torch.equal(after, before)
        assert torch.equal(grad_after, grad_before)
    assert stream.moves > 0


def test_a_parameter_taken_in_parts_is_reached_too(tmp_path: Path) -> None:
    weight = _stored(tmp_path, "experts", torch.randn(3, 64, 64))
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].experts = QuantisedParameter(weight, torch.float32, "reference")
    expected = [model.layers[0].experts[i].clone() for i in range(3)]
    groups = layer_groups(model)
    carrier = Noted()
    LayerStream(groups, carrier)
    assert all(torch.equal(model.layers[0].experts[i], expected[i]) for i in range(3))
    assert ("wait", 0) in carrier.asked


def test_the_next_layer_is_brought_and_the_last_one_goes(tmp_path: Path) -> None:
    groups = layer_groups(_model(tmp_path))
    carrier = Noted()
    stream = LayerStream(groups, carrier)
    assert carrier.asked == [("drop", number) for number in range(LAYERS)]
    carrier.asked.clear()
    _visit(stream, groups, [0, 1])
    assert carrier.asked == [("wait", 0), ("fetch", 1), ("drop", 0), ("wait", 1), ("fetch", 2)]


def test_what_follows_is_learnt_from_the_pass_before(tmp_path: Path) -> None:
    groups = layer_groups(_model(tmp_path))
    stream = LayerStream(groups, Noted())
    there_and_back = [*range(LAYERS), *reversed(range(LAYERS - 1))]
    _visit(stream, groups, there_and_back)
    first = stream.mistaken
    assert first > 0  # the first layer, and the turn at the end
    _visit(stream, groups, there_and_back)
    _visit(stream, groups, there_and_back)
    assert stream.mistaken - first <= 1


def test_layers_make_room_and_the_way_back_is_still_known(tmp_path: Path) -> None:
    groups = layer_groups(_model(tmp_path))
    carrier = Noted()
    stream = LayerStream(groups, carrier)
    for gone in ([LAYERS - 1], [LAYERS - 2, LAYERS - 1]):  # what follows is known the second time
        _visit(stream, groups, range(LAYERS))
        carrier.asked.clear()
        stream.make_room()
        assert carrier.asked == [*(("drop", number) for number in gone), ("release", -1)]
        carrier.asked.clear()
        before = stream.mistaken
        _visit(stream, groups, [*reversed(range(LAYERS))])
        assert carrier.asked[0] == ("wait", LAYERS - 1)
    assert carrier.asked[1] == ("fetch", LAYERS - 2)
    assert stream.mistaken == before


def test_any_order_has_its_layer_here_and_few_beside_it(tmp_path: Path) -> None:
    groups = layer_groups(_model(tmp_path))

    class Counted(Noted):
        def __init__(self) -> None:
            super().__init__()
            self.here = set(range(LAYERS))

        def fetch(self, group: int) -> None:
            self.here.add(group)

        wait = fetch

        def drop(self, group: int) -> None:
            self.here.discard(group)

        def tensors(self, parameter: QuantisedParameter) -> StoredTensors:
            assert any(parameter in groups[number] for number in self.here)
            return parameter.own_tensors()

    carrier: Carrier = Counted()
    stream = LayerStream(groups, carrier, resident=1)
    order = random.Random(0)
    for _ in range(300):
        _visit(stream, groups, [order.randrange(LAYERS)])
        assert len(carrier.here - stream.staying) <= 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(("count", "resident"), [(1, 0), (5, 2), (80, 17), (4, 9), (6, -1)])
def test_so_many_stay_and_lie_apart(count: int, resident: int) -> None:
    found = sorted(resident_groups(count, resident))
    expected = max(0, min(count, resident))
    assert len(found) == expected
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_pages_really_go_and_come(tmp_path: Path) -> None:
    """What is let go is no longer resident, and reads as before when it is touched again."""
    weight = _stored(tmp_path, "large", torch.randn(4096, 4096))  # 8 MB of codes
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    model.layers[0].w = QuantisedLinear(weight, None, "reference")
    model.layers[1].w = QuantisedLinear(_stored(tmp_path, "small", torch.randn(64, 64)), None, "reference")
    groups = layer_groups(model)
    sums = int(weight.codes.sum(dtype=torch.int64))  # touches all
    size = weight.size_bytes
    full = resident_bytes()
    carrier = MappedPages(groups)
    carrier.drop(0)
    empty = resident_bytes()
    assert full - empty > 0.9 * size
    carrier.wait(0)
    assert resident_bytes() - empty > 0.9 * size
    assert int(weight.codes.sum(dtype=torch.int64)) == sums


def test_direct_reads_leave_the_mapping_alone_and_take_two_buffers(tmp_path: Path) -> None:
    """Three layers of 8 MB are visited again and again: two are here at a time, none of them through the mapping."""
    model = nn.Module()
    model.layers = nn.ModuleList()
    for number in range(3):
        model.layers.append(nn.Module())
        weight = _stored(tmp_path, f"large{number}", torch.randn(4096, 4096))
        model.layers[number].w = QuantisedLinear(weight, None, "reference")
    groups = layer_groups(model)
    sums = [int(group[0].own_tensors()[0].sum(dtype=torch.int64)) for group in groups]  # touches all
    size = sum(tensor.nbytes for tensor in groups[0][0].own_tensors())
    before = resident_bytes()
    carrier = direct_reads(groups)
    stream = LayerStream(groups, carrier)
    assert before - resident_bytes() > 2.7 * size  # all three went
    empty = resident_bytes()
    for number in [0, 1, 2, 1, 0, 2, 0] * 3:
        assert int(stream.reach(groups[number][0])[0].sum(dtype=torch.int64)) == sums[number]
    assert 1.9 * size < resident_bytes() - empty < 2.5 * size
    stream.make_room()
    assert resident_bytes() - empty < 0.5 * size
    assert int(stream.reach(groups[2][0])[0].sum(dtype=torch.int64)) == sums[2]


def test_a_file_that_was_replaced_is_not_read_past_the_cache(tmp_path: Path) -> None:
    groups = layer_groups(_model(tmp_path))
    direct_reads(groups)
    path = tmp_path / "up0.safetensors"
    save_file(quantise(torch.randn(96, 64), "reference").serialised("w"), tmp_path / "other")
    (tmp_path / "other").replace(path)
    with pytest.raises(NoDirectReadsError):
        DirectReads(groups)


def test_a_file_that_became_shorter_is_told_of(tmp_path: Path) -> None:
    groups = layer_groups(_model(tmp_path, out=1024, width=1024))
    stream = LayerStream(groups, direct_reads(groups))
    os.truncate(tmp_path / "up3.safetensors", 4096)
    with pytest.raises(FituneError, match=r"up3\.safetensors has become shorter"):
        _visit(stream, groups, [2, 3])


def test_memory_that_is_not_a_file_is_never_let_go() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].w = QuantisedLinear(quantise(torch.randn(64, 64), "reference"), None, "reference")
    assert not is_mapped(model.layers[0].w.stored.codes)
    with pytest.raises(FituneError, match="do not lie in mapped files"):
        MappedPages(layer_groups(model))


def test_spans_are_whole_pages_and_joined() -> None:
    room = torch.empty(1 << 16, dtype=torch.uint8)
    ((start, end),) = spans_of([room[100:300], room[5000:6000], room[:9000]])
    assert start % 4096 == end % 4096 == 0
    assert start <= room.data_ptr()
    assert room.data_ptr() + 9000 <= end


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.layers.3.mlp.up_proj.weight", 3), ("transformer.h.11.attn.", 11), ("lm_head.weight", None)],
)
def test_the_layer_of_a_name(name: str, number: int | None) -> None:
    assert layer_number(name) == number
