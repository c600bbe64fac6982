"""A model whose layers come from the disk: the same bits as with all of them in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fitune.config.schema import RunConfig
from fitune.data.collation import collate
from fitune.errors import InputError
from fitune.fuse.model import FusedModel
from fitune.generate.batch_generation import generate_detailed
from fitune.models import streaming
from fitune.models.folder import FolderSource
from fitune.models.streaming import end_tensors, stream_layers
from fitune.plan.computation import Computation
from fitune.quant.direct_reads import NoDirectReadsError
from fitune.quant.lease import lease_for_generation, leased
from fitune.quant.staged_copies import StagedCopies
from fitune.train.prepare import build_for_answers, build_for_training
from tiny_models import BACKEND, random_samples, write_model

COMPUTATION = Computation(torch.float32, BACKEND, 1, "test")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderSource]:
    folder = tmp_path_factory.mktemp("streaming")
    write_model(folder / "model", num_hidden_layers=5)
    before = os.environ.get("FITUNE_CACHE")
    os.environ["FITUNE_CACHE"] = str(folder / "cache")
    yield FolderSource(folder / "model", str(folder / "model"))
    del os.environ["FITUNE_CACHE"]
    if before is not None:
        os.environ["FITUNE_CACHE"] = before


def built(source: FolderSource, resident_layers: int | None, recompute: str = "none") -> FusedModel:
    train = {"resident_layers": resident_layers, "recompute": recompute}
    config = RunConfig.model_validate({"data": {"train": ["none"]}, "train": train})
    return build_for_training(config, source, COMPUTATION)


def gradients(model: FusedModel) -> tuple[float, list[torch.Tensor]]:
    """Of three passes, the last one's."""
    samples = random_samples([40, 30, 20])
    for _ in range(3):
        for parameter in model.trainable:
            parameter.grad = None
        loss = -model.logprobs(collate([samples], 128, 0))[0].sum()
        loss.backward()
    return float(loss.detach()), [p.grad for p in model.trainable if p.grad is not None]


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_loss_and_gradients_are_the_same_to_the_bit(source: FolderSource, recompute: str) -> None:
    loss, expected = gradients(built(source, None, recompute))
    for resident in (0, 1):
        model = built(source, resident, recompute)
        assert model.stream is not None
        found_loss, found = gradients(model)
        assert found_loss == loss
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(found) == len(expected) > 0
        moves, mistaken = model.stream.moves, model.stream.mistaken
        gradients(model)
        assert model.stream.moves > moves  # layers came and went
        assert model.stream.mistaken == mistaken  # and every one had been expected


def test_layers_that_the_cache_cannot_hold_are_read_past_it_or_it_is_said_why(
    source: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, expected = gradients(built(source, None))
    monkeypatch.setattr(streaming, "memory", lambda: (1000, 1000))  # less than the layers take
    model = built(source, 1)
    found_loss, found = gradients(model)
    assert found_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def refused(groups: object) -> None:
        raise NoDirectReadsError("it cannot be read so")

    monkeypatch.setattr(streaming, "DirectReads", refused)
    left = built(source, 1).report.left
    assert "it cannot be read so" in left["layers read past the file cache"]


def test_copies_on_a_device_give_the_same_bits(source: FolderSource) -> None:
    loss, expected = gradients(built(source, None))
    model = built(source, None)
    model.stream = stream_layers(model.graph, 1, lambda groups: StagedCopies(groups, "cpu"))
    found_loss, found = gradients(model)
    assert found_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_answers_are_the_same(source: FolderSource) -> None:
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13]]
    answers = []
    for resident in (None, 0):
        model = build_for_answers(source, "qlora", COMPUTATION, resident_layers=resident)
        lease = lease_for_generation(model.backend, model.dtype, model.stream is not None)
        with leased(model.graph, lease):
            found = generate_detailed(model.graph, prompts, max_new_tokens=6, eos_ids=frozenset(), pad_id=0)
        answers.append([generation.tokens for generation in found])
    assert answers[0] == answers[1]


def test_embeddings_and_head_are_let_go_where_they_are_mapped(source: FolderSource) -> None:
    narrow = Computation(torch.bfloat16, BACKEND, 1, "test")
    model = build_for_answers(source, "qlora", narrow)
    assert end_tensors(model.graph)
    wide = build_for_answers(source, "qlora", COMPUTATION)  # float32 copies
    assert not end_tensors(wide.graph)


def test_a_model_without_quantised_layers_is_refused(source: FolderSource) -> None:
    model = build_for_answers(source, "lora", COMPUTATION)
    with pytest.raises(InputError, match=r"train\.resident_layers"):
        stream_layers(model.graph, 0)
