"""One optimizer step over any number of micro-batches, in any number of processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fitune.data.batch import Batch
from fitune.errors import FituneError
from fitune.fuse.model import FusedModel
from fitune.kernels.rooms import a_pass
from fitune.step.gradients import gradients_of
from fitune.step.objective import SUPERVISED, Objective, reference_of
from fitune.step.ranks import ALONE, Ranks


class NonFiniteError(FituneError):
    """A loss or gradient that is not a finite number; no weight was changed.

    Attributes:
        parameter: the first whose gradient is not finite; None: the loss alone is not.
    """

    def __init__(self, loss: float, norm: float, parameter: Tensor | None) -> None:
        self.parameter = parameter
        super().__init__(f"loss {loss}, gradient norm {norm}")


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: of the step's objective; of supervised training the mean over all its trained tokens.
        grad_norm: of all gradients together, before clipping.
        trained_tokens: how many tokens counted.
        tokens: how many tokens went through the model.
        reward_accuracy: which share of the step's pairs is told apart rightly (the better answer gained more), or of
            its judged answers (a good one gained more than others do, a bad one less); None: there are none.
        reward_margin: by how much, on average.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    tokens: int
    reward_accuracy: float | None = None
    reward_margin: float | None = None


def update(
    model: FusedModel, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, learning_rate: float,
    max_grad_norm: float, objective: Objective = SUPERVISED, ranks: Ranks = ALONE,
) -> StepResult:  # fmt: skip
    """Changes the trainable weights once, by the gradient over all `batches` together.

    The loss is one sum over all tokens (or pairs) divided by their total weight, so the update does not depend on how
    the step was split into micro-batches. `max_grad_norm` 0 does not clip. Of several `ranks` all are given all
    micro-batches; each computes its share, and all make the same change. Where gradients in float16 overflow, the
    model's loss scale falls and the same step is computed again.

    Raises NonFiniteError before any weight is changed.
    """
    totals = [float(sum(counts)) for counts in zip(*map(objective.counts, batches), strict=True)]
    if not all(totals):
        raise FituneError("a step without a single trained token, pair or judged answer")
    gradients = gradients_of(optimizer)
    objective = objective.begin(model, batches)
    scaled = model.loss_scale
    randoms = None if scaled is None else torch.get_rng_state()
    while True:
        scale = 1.0 if scaled is None else scaled.value
        loss, judged, right, margin = _gradients(model, batches, objective, totals, scale, ranks)
        ranks.add_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]])
        loss, judged, right, margin = ranks.sums([loss, judged, right, margin])
        norm = gradients.norm() / scale
        if math.isfinite(loss) and math.isfinite(norm):
            break
        wrong = gradients.first_non_finite()
        gradients.clear()
        if not math.isfinite(loss) or scaled is None or not scaled.fall():
            raise NonFiniteError(loss, norm, wrong)
        if randoms is not None:
            torch.set_rng_state(randoms)
    factor = (max_grad_norm / norm if max_grad_norm and norm > max_grad_norm else 1.0) / scale
    if factor != 1.0:
        gradients.scale(factor)
    if scaled is not None:
        scaled.note_step()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_ratio", 1.0)
    optimizer.step()
    gradients.clear()
    return StepResult(
        loss,
        norm,
        sum(batch.trained_tokens for batch in batches),
        sum(batch.tokens.numel() for batch in batches),
        right / judged if judged else None,
        margin / judged if judged else None,
    )


def _gradients(
    model: FusedModel, batches: Sequence[Batch], objective: Objective, totals: Sequence[float], scale: float,
    ranks: Ranks,
) -> list[float]:  # fmt: skip
    """Adds this share of the gradients, times `scale`; its loss, and what was judged, judged rightly, by how much."""
    loss = right = margin = judged = 0.0
    for batch in batches[ranks.share(batches)]:
        if not batch.trained_tokens:
            continue
        reference = reference_of(model, batch, objective)
        with a_pass():
            logprobs, weights = model.logprobs(batch)
            found = objective.sums(logprobs, weights, batch, reference)
            terms = [term / total for term, total in zip(found.terms, totals, strict=True)]
            part = sum(terms[1:], terms[0])
            (part if scale == 1.0 else part * scale).backward()
            loss += float(part.detach())
            judged, right, margin = judged + found.judged, right + found.right, margin + found.margin
            del logprobs, found, terms, part
    return [loss, judged, right, margin]
