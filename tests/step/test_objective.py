"""Objectives of preference pairs: the papers' formulas on fixed numbers, and through the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fitune.data.collation import collate
from fitune.data.encoding import EncodedSample
from fitune.data.mismatch import mismatched
from fitune.errors import FituneError
from fitune.fuse.model import FusedModel
from fitune.step.objective import DPO, KTO, ORPO, Objective, measure, objective_of, reference_of
from fitune.step.update import update
from tiny_models import adapted, distance, model_of, random_samples

MODEL, _ = adapted(model_of("llama"))
assert MODEL is not None


def pair(better: int, worse: int, prompt: int = 8, seed: int = 0) -> EncodedSample:
    """A prompt of random tokens, and two answers of so many tokens."""
    first, second = random_samples([prompt + better, prompt + worse], prompt=0, common=prompt, seed=seed)
    fork = prompt - 1  # the token after the fork is not trained
    return EncodedSample(
        first.tokens + second.tokens[fork:],
        tuple(place >= prompt for place in range(prompt + better)) + (False,) + (True,) * worse,
        worse_from=prompt + better,
        fork=fork,
    )


def answers(sample: EncodedSample) -> tuple[EncodedSample, EncodedSample]:
    """The two conversations by themselves."""
    start, fork = sample.worse_from, sample.fork
    better = EncodedSample(sample.tokens[:start], sample.trained[:start])
    worse = EncodedSample(
        sample.tokens[:fork] + sample.tokens[start:], sample.trained[:fork] + sample.trained[start:]
    )
    return better, worse


def alone(model: FusedModel, sample: EncodedSample) -> list[float]:
    """Log-probabilities of a sample's trained tokens, each from a forward pass of transformers' own."""
    with torch.no_grad():
        logits = model.graph(input_ids=torch.tensor([sample.tokens])).logits[0].double().log_softmax(-1)
    return [float(logits[place - 1, sample.tokens[place]]) for place, trained in enumerate(sample.trained) if trained]


PAIRS = [pair(5, 9, seed=1), pair(12, 3, seed=2), pair(7, 7, seed=3), pair(1, 2, seed=4)]


def logprobs_by_hand(pairs: Sequence[EncodedSample]) -> list[tuple[list[float], list[float]]]:
    return [(alone(MODEL, better), alone(MODEL, worse)) for better, worse in map(answers, pairs)]


def base_by_hand(pairs: Sequence[EncodedSample]) -> list[tuple[list[float], list[float]]]:
    assert MODEL.adapted is not None
    with MODEL.adapted.disable_adapter():
        return logprobs_by_hand(pairs)


def softplus(value: float) -> float:
    return math.log1p(math.exp(-abs(value))) + max(value, 0.0)


def dpo_by_hand(beta: float) -> tuple[float, float, float]:
    """Loss, share of margins above 0, and mean margin, by equation 7 of the paper."""
    margins = []
    for (better, worse), (base_better, base_worse) in zip(logprobs_by_hand(PAIRS), base_by_hand(PAIRS), strict=True):
        margins.append(beta * ((sum(better) - sum(base_better)) - (sum(worse) - sum(base_worse))))
    count = len(margins)
    loss = sum(softplus(-margin) for margin in margins) / count
    return loss, sum(margin > 0 for margin in margins) / count, sum(margins) / count


def orpo_by_hand(beta: float) -> float:
    """By equations 4 to 6 of the paper."""
    found = logprobs_by_hand(PAIRS)
    odds = [[sum(one) / len(one) - math.log(1 - math.exp(sum(one) / len(one))) for one in both] for both in found]
    supervised = -sum(sum(better) for better, _ in found) / sum(len(better) for better, _ in found)
    return supervised + beta * sum(softplus(-(better - worse)) for better, worse in odds) / len(odds)


JUDGED = [
    replace(sample, label=place in (0, 3))
    for place, sample in enumerate(random_samples([9, 17, 12, 6, 14], prompt=5, seed=8))
]


def mixed(one: EncodedSample, other: EncodedSample) -> EncodedSample:
    """The question of one with the answer of the other."""
    tokens = one.tokens[:5] + other.tokens[5:]
    return EncodedSample(tokens, tuple(place >= 5 for place in range(len(tokens))))


def gains_by_hand(samples: Sequence[EncodedSample]) -> list[float]:
    assert MODEL.adapted is not None
    ours = [sum(alone(MODEL, sample)) for sample in samples]
    with MODEL.adapted.disable_adapter():
        return [one - sum(alone(MODEL, sample)) for one, sample in zip(ours, samples, strict=True)]


def baseline_by_hand() -> float:
    others = [mixed(one, other) for one, other in zip(JUDGED, [*JUDGED[1:], JUDGED[0]], strict=True)]
    return max(0.0, sum(gains_by_hand(others)) / len(others))


def kto_by_hand(beta: float, good: float, bad: float) -> float:
    """By equation 8 of the paper, without the constant."""
    z = baseline_by_hand()
    values = []
    for gain, sample in zip(gains_by_hand(JUDGED), JUDGED, strict=True):
        v = 1 / (1 + math.exp(-beta * (gain - z) * (1 if sample.label else -1)))
        values.append((good if sample.label else bad) * (1 - v))
    return sum(values) / len(values)


def test_fixed_numbers() -> None:
    """Of two pairs with one token each, worked out by hand."""
    sample = EncodedSample((1, 2, 3, 4), (False, True, False, True), worse_from=2, fork=0)
    batch = collate([[sample, sample]], 64, 0)
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -0.25])
    reference = torch.tensor([-1.5, -1.0, -0.75, -0.5])
    weights = torch.ones(4)
    # gains 0.5, -1 and 0.25, 0.25; margins of beta 0.1: 0.15 and 0
    dpo = DPO(0.1).sums(logprobs, weights, batch, reference)
    assert [float(term) for term in dpo.terms] == pytest.approx([0.6209570 + 0.6931472], rel=1e-6)
    assert (dpo.right, dpo.margin) == (1.0, pytest.approx(0.15))
    # log odds: -0.5413249 and -1.8545865; 0.4327521 and 1.2586735
    orpo = ORPO(0.1).sums(logprobs, weights, batch)
    pairs = math.log1p(math.exp(-1.3132617)) + math.log1p(math.exp(0.8259214))
    assert [float(term) for term in orpo.terms] == pytest.approx([1.5, 0.1 * pairs], rel=1e-5)
    assert [float(count) for count in ORPO(0.1).counts(batch)] == [2.0, 2.0]


def test_two_answers_in_a_row_are_what_they_are_alone() -> None:
    for sample in PAIRS:
        batch = collate([[sample]], 512, 0)
        assert batch.documents[:3, 3:].tolist() == [[0, 0], [0, sample.fork], [0, sample.fork]]
        assert batch.pairs.tolist() == [[1, 2]]
        with torch.no_grad():
            logprobs, _ = MODEL.logprobs(batch)
        better, worse = answers(sample)
        expected = torch.tensor([*alone(MODEL, better), *alone(MODEL, worse)])
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", [[PAIRS], [PAIRS[:1], PAIRS[1:]], [[one] for one in PAIRS]])
def test_they_are_the_papers(rows: list[list[EncodedSample]]) -> None:
    batches = [collate([row], 512, 0) for row in rows]
    loss, accuracy, margin = dpo_by_hand(0.5)
    found = measure(MODEL, batches, DPO(0.5))
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert (found.reward_accuracy, found.reward_margin) == (accuracy, pytest.approx(margin, rel=1e-4))
    assert measure(MODEL, batches, ORPO(0.3)).loss == pytest.approx(orpo_by_hand(0.3), rel=1e-5)


@pytest.mark.parametrize("rows", [[JUDGED], [JUDGED[:2], JUDGED[2:]], [[one] for one in JUDGED]])
def test_judged_answers_are_the_papers(rows: list[list[EncodedSample]]) -> None:
    batches = [collate([row], 512, 0) for row in rows]
    assert baseline_by_hand() > 0.01
    assert measure(MODEL, batches, KTO(0.5, 1.5, 0.8)).loss == pytest.approx(kto_by_hand(0.5, 1.5, 0.8), rel=1e-5)
    assert abs(kto_by_hand(0.5, 1.5, 0.8) - kto_by_hand(0.5, 1.0, 1.0)) > 1e-2


def test_a_single_answer_has_no_baseline() -> None:
    batch = collate([JUDGED[:1]], 512, 0)
    assert mismatched([batch]) == []
    gain = gains_by_hand(JUDGED[:1])[0]
    assert measure(MODEL, [batch], KTO(0.5)).loss == pytest.approx(1 / (1 + math.exp(0.5 * gain)), rel=1e-5)


def test_answers_are_exchanged_within_the_rows_there_are() -> None:
    batches = [collate([JUDGED[:2], JUDGED[2:4]], 32, 0), collate([JUDGED[4:]], 32, 0)]
    found = mismatched(batches)
    assert all(batch.tokens.shape[0] <= 2 and batch.tokens.shape[1] <= 32 for batch in found)
    expected = [mixed(one, other).tokens for one, other in zip(JUDGED, [*JUDGED[1:], JUDGED[0]], strict=True)]
    seen = [
        tuple(batch.tokens[row, start:stop].tolist())
        for batch in found
        for place, (row, start, stop, *_) in enumerate(batch.documents.tolist())
        if batch.labels[place]
    ]
    assert sorted(seen) == sorted(expected)


def test_answers_are_not_put_together_where_a_model_does_not_keep_them_apart() -> None:
    batches = [collate([JUDGED], 256, 0)]
    together, apart = (mismatched(batches, packs) for packs in (True, False))
    assert sum(len(batch.tokens) for batch in together) < len(JUDGED)
    assert sum(len(batch.tokens) for batch in apart) == len(JUDGED)
    for batch in apart:
        rows = batch.documents[batch.labels != 0][:, 0].tolist()
        assert sorted(rows) == list(range(len(batch.tokens)))


class Recording(torch.optim.SGD):
    """Keeps the gradients it was given, and changes nothing (rate 0)."""

    def step(self, closure: object = None) -> None:
        self.seen = torch.cat([p.grad.flatten().clone() for group in self.param_groups for p in group["params"]])


@pytest.mark.parametrize(("objective", "samples"), [(DPO(0.5), PAIRS), (ORPO(0.3), PAIRS), (KTO(0.5, 1.5), JUDGED)])
def test_a_step_does_not_depend_on_how_it_was_split(objective: Objective, samples: list[EncodedSample]) -> None:
    def of(*rows: list[list[EncodedSample]]):
        optimizer = Recording(MODEL.trainable, lr=0.0)
        result = update(MODEL, [collate(row, 512, 0) for row in rows], optimizer, 0.0, 0.0, objective)
        return optimizer.seen, result

    whole, result = of([samples])
    # Judged answers come in another order, but each is followed by the same one.
    for rows in ([[[one]] for one in samples], [[samples[:2], samples[2:]]], [[samples[2:]], [samples[:2]]]):
        found, other = of(*rows)
        assert distance(found, whole) < 1e-5
        assert other.loss == pytest.approx(result.loss, rel=1e-5)
        assert other.reward_margin == pytest.approx(result.reward_margin, rel=1e-4)
    assert float(whole.norm()) > 1e-3


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_the_gradient_is_that_of_transformers_and_peft(name: str) -> None:
    """Each answer a pass of its own through PEFT's layers, and autograd through the papers' formulas."""
    _, peft = adapted(model_of("llama"), fused=False)
    trainable = [parameter for parameter in peft.parameters() if parameter.requires_grad]

    def sums(sample: EncodedSample) -> torch.Tensor:
        logits = peft(input_ids=torch.tensor([sample.tokens])).logits[0].log_softmax(-1)
        places = [place for place, trained in enumerate(sample.trained) if trained]
        return torch.stack([logits[place - 1, sample.tokens[place]] for place in places])

    total = torch.zeros(())
    for one in JUDGED if name == "kto" else ():
        with torch.no_grad(), peft.disable_adapter():
            base = sums(one).sum()
        sign = 1 if one.label else -1
        total = total + torch.sigmoid(-0.5 * sign * (sums(one).sum() - base - baseline_by_hand())) / len(JUDGED)
    tokens = sum(sum(answers(one)[0].trained) for one in PAIRS)
    for one in () if name == "kto" else PAIRS:
        better, worse = map(sums, answers(one))
        if name == "dpo":
            with torch.no_grad(), peft.disable_adapter():
                base_better, base_worse = map(sums, answers(one))
            gain = (better.sum() - base_better.sum()) - (worse.sum() - base_worse.sum())
            total = total - torch.log(torch.sigmoid(0.5 * gain)) / len(PAIRS)
        else:
            odds = [torch.log(p / (1 - p)) for p in (better.mean().exp(), worse.mean().exp())]
            total = total - better.sum() / tokens - 0.5 * torch.log(torch.sigmoid(odds[0] - odds[1])) / len(PAIRS)
    total.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in trainable])
    optimizer = Recording(MODEL.trainable, lr=0.0)
    batch = collate([JUDGED if name == "kto" else PAIRS], 512, 0)
    result = update(MODEL, [batch], optimizer, 0.0, 0.0, objective_of(name, 0.5))
    assert result.loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert distance(optimizer.seen, expected) < 1e-4


def test_an_exchanged_pair_and_a_missing_reference_are_noticed() -> None:
    batch = collate([PAIRS], 512, 0)
    right = measure(MODEL, [batch], DPO(0.5))
    other = measure(MODEL, [replace(batch, pairs=batch.pairs.flip(1))], DPO(0.5))
    assert other.reward_margin == pytest.approx(-right.reward_margin)
    assert abs(other.loss - right.loss) > 1e-3
    with torch.no_grad():
        logprobs, weights = MODEL.logprobs(batch)
    without = DPO(0.5).sums(logprobs, weights, batch, torch.zeros_like(logprobs))
    assert abs(float(without.terms[0]) / 4 - right.loss) > 1e-2


def test_the_reference_is_the_base_without_noise_and_leaves_no_trace() -> None:
    batch = collate([PAIRS], 512, 0)
    noisy, _ = adapted(model_of("llama"), dropout=0.5)
    assert noisy is not None
    learns = [parameter.requires_grad for parameter in noisy.graph.parameters()]
    state = torch.get_rng_state()
    found = reference_of(noisy, batch, DPO(0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in noisy.graph.parameters()] == learns
    assert noisy.graph.training
    expected = torch.tensor([one for both in base_by_hand(PAIRS) for answer in both for one in answer])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_without_an_adapter_there_is_no_reference() -> None:
    bare = FusedModel(MODEL.graph, None, MODEL.dtype, MODEL.backend, MODEL.report)
    with pytest.raises(FituneError, match="without its adapter"):
        update(bare, [collate([PAIRS], 512, 0)], Recording(MODEL.trainable, lr=0.0), 0.0, 0.0, DPO(0.5))
