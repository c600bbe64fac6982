"""What a step makes smaller, as a function of per-token log-probabilities: for single answers and for pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fitune.data.batch import Batch
from fitune.data.mismatch import mismatched
from fitune.errors import FituneError
from fitune.fuse.model import FusedModel
from fitune.kernels.rooms import a_pass


@dataclass(frozen=True)
class Sums:
    """Of one micro-batch.

    Attributes:
        terms: the objective's parts, each a sum over the micro-batch, to be divided by the step's `counts`.
        right: how many pairs (or judged answers) are on the right side: the better answer gained more than the worse.
        margin: by how much, summed over them; judged: how many there are.
    """

    terms: tuple[Tensor, ...]
    right: float = 0.0
    margin: float = 0.0
    judged: int = 0


class Objective(Protocol):
    """A sum over micro-batches of terms, each divided by a count over all of them: so no split changes the step."""

    @property
    def needs_reference(self) -> bool:
        """Whether it looks at what the base makes of the same tokens."""

    @property
    def looks_ahead(self) -> bool:
        """Whether `begin` looks at the micro-batches."""

    @property
    def forwards(self) -> int:
        """Forward passes of a step, those of the base and of what `begin` looks at included."""

    def begin(self, model: FusedModel, batches: Sequence[Batch]) -> Objective:
        """What it is for the step of these micro-batches."""

    def counts(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the terms of a step are divided by, this micro-batch's part of it."""

    def sums(self, logprobs: Tensor, weights: Tensor, batch: Batch, reference: Tensor | None) -> Sums:
        """From log-probabilities [n] of the tokens of non-zero weight, differentiable, and the reference's [n]."""


class _Plain:
    """The same for every step."""

    needs_reference = False
    looks_ahead = False
    forwards = 1

    def begin(self, model: FusedModel, batches: Sequence[Batch]) -> Self:
        """As of all objectives."""
        return self


class Supervised(_Plain):
    """The mean negative log-probability of the trained tokens."""

    def counts(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tokens' weights."""
        return (batch.weights.sum(),)

    def sums(self, logprobs: Tensor, weights: Tensor, batch: Batch, reference: Tensor | None = None) -> Sums:
        """As of all objectives."""
        return Sums((-(logprobs * weights).sum(),))


@dataclass(frozen=True)
class DPO(_Plain):
    """Direct preference optimisation (arXiv 2305.18290, equation 7): -log sigmoid(beta (gain of better - of worse)).

    A gain is how much likelier the model makes an answer than the reference does: log pi(y|x) - log pi_ref(y|x).
    """

    beta: float
    needs_reference = True
    forwards = 2

    def counts(self, batch: Batch) -> tuple[Tensor, ...]:
        """The pairs."""
        return (_pairs(batch),)

    def sums(self, logprobs: Tensor, weights: Tensor, batch: Batch, reference: Tensor | None) -> Sums:
        """As of all objectives."""
        assert reference is not None
        gains, _ = _of_answers(logprobs - reference, weights, batch)
        margins = self.beta * (gains[:, 0] - gains[:, 1])
        return _judged((-logsigmoid(margins).sum(),), margins)


@dataclass(frozen=True)
class ORPO(_Plain):
    """Odds ratio preference optimisation (arXiv 2403.07691, equation 6): supervised on the better answer, and
    -beta log sigmoid(log odds of better - of worse).

    The odds of an answer are p / (1 - p), p being the geometric mean of its tokens' probabilities.
    """

    beta: float

    def counts(self, batch: Batch) -> tuple[Tensor, ...]:
        """The better answers' tokens, and the pairs."""
        places = batch.weights.reshape(-1).nonzero().squeeze(1)
        is_better = torch.isin(batch.document_of(places), batch.pairs[:, 0])
        return is_better.sum().float(), _pairs(batch)

    def sums(self, logprobs: Tensor, weights: Tensor, batch: Batch, reference: Tensor | None = None) -> Sums:
        """As of all objectives."""
        totals, tokens = _of_answers(logprobs, weights, batch)
        means = totals / tokens.clamp(min=1)
        odds = means - torch.log1p(-torch.exp(means.clamp(max=-1e-6)))
        margins = odds[:, 0] - odds[:, 1]
        return _judged((-totals[:, 0].sum(), -self.beta * logsigmoid(margins).sum()), margins)


@dataclass(frozen=True)
class KTO(_Plain):
    """Kahneman-Tversky optimisation (arXiv 2402.01306, equation 8), of answers that are good or bad by themselves:
    weight (1 - sigmoid(beta (gain - z))) of a good one, weight (1 - sigmoid(beta (z - gain))) of a bad one.

    Attributes:
        baseline: z, the gain of answers in general: the mean over the step's questions, each with the answer to
            another one, and at least 0.
    """

    beta: float
    good_weight: float = 1.0
    bad_weight: float = 1.0
    baseline: float = 0.0
    needs_reference = True
    looks_ahead = True
    forwards = 4

    def begin(self, model: FusedModel, batches: Sequence[Batch]) -> KTO:
        """With the step's baseline."""
        gains, count = 0.0, 0
        was_training = model.graph.training
        model.graph.eval()
        for batch in mismatched(batches, model.report.packs):
            reference = reference_of(model, batch, self)
            assert reference is not None
            with a_pass(), torch.no_grad():
                logprobs, weights = model.logprobs(batch)
                gains += float(((logprobs.double() - reference.double()) * weights).sum())
            count += int((batch.labels != 0).sum())
        model.graph.train(was_training)
        mean = gains / count if count else 0.0
        return replace(self, baseline=0.0 if mean <= 0 else mean)  # what is no number stays none

    def counts(self, batch: Batch) -> tuple[Tensor, ...]:
        """The judged answers."""
        return ((batch.labels != 0).sum().float(),)

    def sums(self, logprobs: Tensor, weights: Tensor, batch: Batch, reference: Tensor | None) -> Sums:
        """As of all objectives."""
        assert reference is not None
        gains, _ = _by_document(logprobs - reference, weights, batch)
        judged = batch.labels != 0
        labels = batch.labels[judged]
        margins = self.beta * labels * (gains[judged] - self.baseline)
        share = torch.where(labels > 0, self.good_weight, self.bad_weight)
        return _judged(((share * torch.sigmoid(-margins)).sum(),), margins)


SUPERVISED = Supervised()
# Those of pairs; all but supervised training judge answers.
PAIRED = ("dpo", "orpo")


def objective_of(name: str, beta: float, good_weight: float = 1.0, bad_weight: float = 1.0) -> Objective:
    """The objective of a run file's `train.objective`, with its settings."""
    made: dict[str, Objective] = {
        "supervised": SUPERVISED, "dpo": DPO(beta), "orpo": ORPO(beta), "kto": KTO(beta, good_weight, bad_weight),
    }  # fmt: skip
    return made[name]


def _pairs(batch: Batch) -> Tensor:
    return torch.tensor(float(len(batch.pairs)))


def _of_answers(values: Tensor, weights: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """As `_by_document`, of both answers of each pair; [p, 2] each."""
    sums, tokens = _by_document(values, weights, batch)
    return sums[batch.pairs], tokens[batch.pairs]


def _by_document(values: Tensor, weights: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each document the sum of values [n] times their weights over its tokens, and that of the weights."""
    places = batch.weights.reshape(-1).nonzero().squeeze(1)
    documents = batch.document_of(places)
    zeros = values.new_zeros(len(batch.documents))
    return zeros.index_add(0, documents, values * weights), zeros.index_add(0, documents, weights)


def _judged(terms: tuple[Tensor, ...], margins: Tensor) -> Sums:
    found = margins.detach()
    return Sums(terms, float((found > 0).sum()), float(found.sum()), len(found))


@dataclass(frozen=True)
class Measured:
    """An objective's value over some micro-batches; the last two are None where nothing is judged."""

    loss: float
    reward_accuracy: float | None
    reward_margin: float | None


def measure(model: FusedModel, batches: Iterable[Batch], objective: Objective, has_begun: bool = False) -> Measured:
    """The objective's value, without gradients, as the model is now; NaN where there is nothing to measure.

    `has_begun`: `objective` is that of a step already, of which `batches` are a part.
    """
    if objective.looks_ahead and not has_begun:
        batches = list(batches)
        objective = objective.begin(model, batches)
    terms: list[float] = []
    counts: list[float] = []
    judged = right = margin = 0.0
    with torch.no_grad():
        for batch in batches:
            if not batch.trained_tokens:
                continue
            reference = reference_of(model, batch, objective)
            logprobs, weights = model.logprobs(batch)
            reference = None if reference is None else reference.double()
            found = objective.sums(logprobs.double(), weights.double(), batch, reference)
            terms = [one + float(other) for one, other in _together(terms, found.terms)]
            counts = [one + float(other) for one, other in _together(counts, objective.counts(batch))]
            judged, right, margin = judged + found.judged, right + found.right, margin + found.margin
    loss = sum(term / count for term, count in zip(terms, counts, strict=True)) if terms else float("nan")
    return Measured(loss, right / judged if judged else None, margin / judged if judged else None)


def reference_of(model: FusedModel, batch: Batch, objective: Objective) -> Tensor | None:
    """The base's log-probabilities [n], where the objective needs them.

    Raises FituneError where the model has no adapter to switch off.
    """
    if not objective.needs_reference:
        return None
    if model.adapted is None:
        raise FituneError("this objective compares with the model without its adapter; there is none")
    was_training = model.graph.training
    model.graph.eval()
    try:
        with a_pass(), torch.no_grad(), model.adapted.disable_adapter():
            return model.logprobs(batch)[0].clone()
    finally:
        model.graph.train(was_training)


def _together(sums: list[float], more: tuple[Tensor, ...]) -> zip[tuple[float, Tensor]]:
    return zip(sums or [0.0] * len(more), more, strict=True)
