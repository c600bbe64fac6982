from __future__ import annotations

import pytest

from fitune.config.schema import RunConfig
from fitune.data.collation import collate
from fitune.data.encoding import EncodedSample
from fitune.data.token_table import Samples
from fitune.step.objective import KTO
from fitune.train.data_cautions import data_cautions
from fitune.train.loss_spikes import worst_samples
from tiny_models import adapted, model_of, random_samples


def judged(*labels: bool | None) -> Samples:
    return Samples.of([EncodedSample((n, 1), (False, True), label=label) for n, label in enumerate(labels)])


def said(samples: Samples, objective: str, pack: bool = True, **train: int) -> list[str]:
    settings = {"data": {"train": "a.jsonl", "pack": pack}, "train": {"objective": objective, **train}}
    return list(data_cautions(RunConfig.model_validate(settings), samples))


def test_answers_of_one_kind() -> None:
    (told,) = said(judged(True, True), "kto")
    assert "all 2 answers are labelled good, and none bad" in told
    (told,) = said(judged(False), "kto")
    assert "all 1 answers are labelled bad, and none good" in told
    assert not said(judged(True, False), "kto")
    assert not said(judged(None), "supervised")


def test_one_answer_a_step() -> None:
    (told,) = said(judged(True, False), "kto", pack=False, micro_batch=1)
    assert "a step has one answer" in told
    assert not said(judged(True, False), "kto", pack=False, micro_batch=1, accumulation=2)


def test_a_sample_that_stands_out_is_measured_as_in_its_step() -> None:
    """Against the gain of the step's answers in general, which a sample by itself has none of."""
    model, _ = adapted(model_of("llama"))
    assert model is not None
    samples: list[EncodedSample] = []
    for seed in range(20):  # until answers in general gain something
        plain = random_samples([20, 24, 30, 22], prompt=10, seed=seed)
        samples = [EncodedSample(one.tokens, one.trained, label=n % 2 == 0) for n, one in enumerate(plain)]
        if KTO(2.0).begin(model, [collate([samples], 256, 0)]).baseline > 0.01:
            break
    together = {one.loss for one in worst_samples(model, samples, 64, KTO(2.0))}
    alone = {one.loss for sample in samples for one in worst_samples(model, [sample], 64, KTO(2.0))}
    assert len(together) == 3
    assert not any(loss == pytest.approx(other, rel=1e-4) for loss in together for other in alone)
