"""One update: the same for any split into micro-batches, the right loss, clipping, and the guard."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.data.collation import collate
from fitune.data.encoding import EncodedSample
from fitune.errors import FituneError, InputError
from fitune.fuse.model import FusedModel
from fitune.kernels.rooms import SMALLEST_BYTES, rooms
from fitune.step.optimizer import make_optimizer
from fitune.step.schedule import Schedule
from fitune.step.update import NonFiniteError, update
from tiny_models import BACKEND, adapted, distance, model_of, random_samples

MODEL, PEFT = adapted(model_of("llama"))
assert MODEL is not None


class Recording(torch.optim.SGD):
    """Keeps the gradients it was given, and changes nothing (rate 0)."""

    def step(self, closure: object = None) -> None:
        self.seen = torch.cat([p.grad.flatten().clone() for group in self.param_groups for p in group["params"]])


def gradient(model: FusedModel, splits: list[list[list[EncodedSample]]], limit: float = 0.0):
    """Of a step whose micro-batches are `splits`, each a list of rows."""
    optimizer = Recording(model.trainable, lr=0.0)
    result = update(model, [collate(rows, 512, 0) for rows in splits], optimizer, 0.0, limit)
    assert all(parameter.grad is None for parameter in model.trainable)
    return optimizer.seen, result


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.lists(st.integers(5, 40), min_size=2, max_size=6), st.data())
def test_an_update_does_not_depend_on_how_the_step_was_split(lengths: list[int], data: st.DataObject) -> None:
    samples = random_samples(lengths, seed=sum(lengths))
    whole, result = gradient(MODEL, [[samples]])
    cuts = sorted(data.draw(st.sets(st.integers(1, len(samples) - 1))))
    bounds = [0, *cuts, len(samples)]
    parts = [samples[start:stop] for start, stop in pairwise(bounds)]
    packed = [[part] for part in parts]
    unpacked = [[[sample] for sample in part] for part in parts]
    for splits in (packed, unpacked, [[[sample]] for sample in reversed(samples)]):
        found, other = gradient(MODEL, splits)
        assert distance(found, whole) < 1e-5
        assert other.loss == pytest.approx(result.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)
        assert other.trained_tokens == result.trained_tokens == sum(sample.trained_tokens for sample in samples)


def test_the_loss_is_the_mean_over_trained_tokens_one_by_one() -> None:
    samples = random_samples([9, 30, 14])
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            for place, trained in enumerate(sample.trained):
                if trained:  # each token from a forward pass of its own beginning
                    logits = MODEL.graph(input_ids=torch.tensor([sample.tokens[:place]])).logits[0, -1].double()
                    total -= float(logits.log_softmax(-1)[sample.tokens[place]])
                    count += 1
    _, result = gradient(MODEL, [[samples[:2]], [samples[2:]]])
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.trained_tokens == count


def test_a_micro_batch_without_trained_tokens_counts_nothing() -> None:
    samples = random_samples([9, 30])
    silent = EncodedSample(tuple(range(12)), (False,) * 12)
    assert torch.equal(gradient(MODEL, [[samples], [[silent]]])[0], gradient(MODEL, [[samples]])[0])
    with pytest.raises(FituneError, match="without a single trained token"):
        gradient(MODEL, [[[silent]]])


def test_clipping_keeps_the_direction_and_bounds_the_norm() -> None:
    samples = random_samples([9, 30])
    whole, result = gradient(MODEL, [[samples]])
    assert result.grad_norm == pytest.approx(float(whole.norm()), rel=1e-5)
    clipped, other = gradient(MODEL, [[samples]], limit=result.grad_norm / 4)
    assert other.grad_norm == result.grad_norm
    torch.testing.assert_close(clipped, whole / 4, rtol=1e-5, atol=1e-9)
    assert torch.equal(gradient(MODEL, [[samples]], limit=result.grad_norm * 1.01)[0], whole)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_changes_nothing(odd: float) -> None:
    model, _ = adapted(copy.deepcopy(model_of("llama")))
    samples = random_samples([9, 30])
    optimizer = make_optimizer("adamw", model.trainable, (0.9, 0.999), 0.1, "reference")
    update(model, [collate([samples], 512, 0)], optimizer, 1e-3, 1.0)
    before = [parameter.detach().clone() for parameter in model.trainable]
    states = copy.deepcopy(optimizer.state_dict()["state"])
    norm = model.graph.model.layers[1].input_layernorm.weight
    kept = norm.data.clone()
    norm.data[3] = odd
    with pytest.raises(NonFiniteError, match="gradient norm"):
        update(model, [collate([samples[:1]], 512, 0), collate([samples[1:]], 512, 0)], optimizer, 1e-3, 1.0)
    assert all(torch.equal(p, old) for p, old in zip(model.trainable, before, strict=True))
    assert all(parameter.grad is None for parameter in model.trainable)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states[index][name]) for name, value in state.items())
    norm.data.copy_(kept)
    assert math.isfinite(update(model, [collate([samples], 512, 0)], optimizer, 1e-3, 1.0).loss)


def test_updates_are_adamws() -> None:
    """Three steps against torch's AdamW on gradients that autograd makes from the same model."""
    samples = random_samples([9, 30, 14])
    ours, _ = adapted(copy.deepcopy(model_of("llama")))
    theirs, _ = adapted(copy.deepcopy(model_of("llama")))
    optimizer = make_optimizer("adamw", ours.trainable, (0.9, 0.95), 0.1, "reference")
    other = torch.optim.AdamW(theirs.trainable, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    for rate in (1e-2, 5e-3, 1e-3):
        update(ours, [collate([[sample]], 512, 0) for sample in samples], optimizer, rate, 0.0)
        logprobs, weights = theirs.logprobs(collate([samples], 512, 0))
        (-(logprobs * weights).sum() / weights.sum()).backward()
        other.param_groups[0]["lr"] = rate
        other.step()
        other.zero_grad()
    for one, two in zip(ours.trainable, theirs.trainable, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_unknown_optimizers_are_refused() -> None:
    with pytest.raises(InputError, match=r"no optimizer called 'sgd'"):
        make_optimizer("sgd", MODEL.trainable, (0.9, 0.999), 0.0, "reference")


@given(
    st.sampled_from(["cosine", "linear", "constant", "polynomial"]),
    st.integers(1, 300),
    st.floats(0, 1),
    st.floats(1e-6, 1),
)
def test_schedules(kind: str, steps: int, share: float, peak: float) -> None:
    rates = [Schedule(kind, peak, steps, share).rate(step) for step in range(steps)]
    warmup = round(steps * share)
    assert all(0 < rate <= peak for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < steps:
        assert rates[warmup] == peak
        if kind == "constant":
            assert set(rates[warmup:]) == {peak}


def test_schedules_by_hand() -> None:
    linear = Schedule("linear", 1.0, 10, 0.2)
    assert [round(linear.rate(step), 4) for step in range(10)] == [
        0.3333, 0.6667, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125,
    ]  # fmt: skip
    cosine = Schedule("cosine", 1.0, 4, 0.0)
    assert [round(cosine.rate(step), 4) for step in range(4)] == [1.0, 0.8536, 0.5, 0.1464]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("kind", "theirs", "more"),
    [
        ("cosine", "cosine", {}),
        ("linear", "linear", {}),
        ("polynomial", "polynomial", {"power": 3.0, "lr_end": 0.0}),
        ("cosine_restarts", "cosine_with_restarts", {"num_cycles": 3}),
    ],
)
def test_schedules_beside_transformers(kind: Any, theirs: str, more: dict[str, Any], warmup: int) -> None:
    """The same after the warm-up; ours begins one step higher, as a rate of 0 would waste a step."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(theirs, optimizer, warmup, 60, scheduler_specific_kwargs=more)
    expected = []
    for _ in range(60):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = Schedule(kind, 0.5, 60, 0.0, warmup_steps=warmup, power=3.0, cycles=3)
    assert [ours.rate(step) for step in range(warmup, 60)] == pytest.approx(expected[warmup:])
    assert all(0 < ours.rate(step) <= 0.5 for step in range(60))


def test_rates_end_at_their_floor() -> None:
    found = Schedule("linear", 1.0, 100, 0.0, floor=0.1)
    assert found.rate(0) == 1.0
    assert found.rate(50) == pytest.approx(0.55)
    assert found.rate(100) == pytest.approx(0.1)


@pytest.mark.skipif(BACKEND != "native", reason="rooms are for results of native kernels")
def test_micro_batches_of_other_lengths_take_the_rooms_of_the_longest() -> None:
    """Rows of 512 and of 256 tokens in one step: what the first took is not kept beside what the second takes."""
    model, _ = adapted(model_of("llama", hidden_size=256, intermediate_size=1024))
    assert model is not None
    optimizer = Recording(model.trainable, lr=0.0)
    samples = random_samples([512, 256, 320], seed=0)
    most: list[int] = []
    backward = torch.Tensor.backward

    def watched(loss: torch.Tensor) -> None:
        backward(loss)
        most.append(rooms.held_bytes)

    taken = []
    for lengths in ([0], [1, 0], [2, 0, 1]):
        rooms.clear()
        most.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.Tensor, "backward", watched)
            update(model, [collate([[samples[n]]], 512, 0) for n in lengths], optimizer, 0.0, 0.0)
        taken.append(max(most))
    rooms.clear()
    assert taken[0] > 4 * SMALLEST_BYTES
    assert max(taken) < 1.15 * taken[0]
