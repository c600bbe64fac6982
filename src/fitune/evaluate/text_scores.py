"""Scores of generated text against references: BLEU, chrF, ROUGE-L and exact match, each with its interval.

BLEU and chrF are sacrebleu's, with the signature that lets others compute the same number; ROUGE-L is
rouge-score's F-measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from fitune.errors import FituneError
from fitune.evaluate.intervals import (
    RESAMPLES,
    CorpusScore,
    Interval,
    PairedDifference,
    Rows,
    bootstrap_interval,
    paired_difference,
    proportion_interval,
)

METRICS = ("bleu", "chrf", "rouge_l", "exact_match")


@dataclass(frozen=True, slots=True)
class TextScore:
    """A metric over a corpus: BLEU and chrF from 0 to 100, ROUGE-L and exact match from 0 to 1.

    Attributes:
        signature: everything needed to compute the same number elsewhere.
    """

    metric: str
    interval: Interval
    signature: str


def text_scores(
    hypotheses: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    metrics: Sequence[str] = METRICS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, TextScore]:
    """Generated texts and their references (one or several each) -> metric name -> score.

    With several references, ROUGE-L takes the best and exact match any of them; BLEU and chrF count as
    sacrebleu does. Exact match compares after stripping outer white space.

    Raises:
        FituneError: no texts, unequal numbers, a text without reference, an unknown metric.
    """
    return {metric: _score(metric, hypotheses, references, resamples, seed) for metric in _known(metrics)}


def compare_texts(
    first: Sequence[str],
    second: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    metrics: Sequence[str] = METRICS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Two systems' texts for the same references -> metric name -> second minus first, on its scale."""
    differences = {}
    for metric in _known(metrics):
        left, score, _ = _statistics(metric, first, references)
        right, _, _ = _statistics(metric, second, references)
        differences[metric] = paired_difference(left, right, score, resamples=resamples, seed=seed)
    return differences


def _known(metrics: Sequence[str]) -> Sequence[str]:
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise FituneError(f"no such text metric: {', '.join(unknown)}; there are {', '.join(METRICS)}")
    return metrics


def _score(
    metric: str,
    hypotheses: Sequence[str],
    references: Sequence[str | Sequence[str]],
    resamples: int,
    seed: int,
) -> TextScore:
    rows, score, signature = _statistics(metric, hypotheses, references)
    if metric == "exact_match":
        interval = proportion_interval(int(rows.sum()), len(rows))
    else:
        interval = bootstrap_interval(rows, score, resamples=resamples, seed=seed)
    return TextScore(metric, interval, signature)


def _statistics(
    metric: str, hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]
) -> tuple[Rows, CorpusScore | None, str]:
    """-> each text's statistics [n, S], the corpus score of their sum (None: the mean), the signature."""
    if not hypotheses or len(hypotheses) != len(references):
        raise FituneError(f"{len(hypotheses)} texts cannot be scored against {len(references)} references")
    several = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    if bare := [number for number, group in enumerate(several) if not group]:
        raise FituneError(f"texts without a reference: {bare[:10]}")
    if metric == "exact_match":
        rights = [text.strip() in {r.strip() for r in group} for text, group in zip(hypotheses, several, strict=True)]
        return np.array(rights, dtype=np.float64), None, "exact match after stripping outer white space"
    if metric == "rouge_l":
        return (
            _rouge_l(hypotheses, several),
            None,
            f"rougeL fmeasure|stemmer:no|version:{version('rouge-score')}",
        )
    return _sacrebleu(metric, hypotheses, several)


def _rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Rows:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: slow

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return np.array(
        [
            max(scorer.score(reference, text)["rougeL"].fmeasure for reference in group)
            for text, group in zip(hypotheses, references, strict=True)
        ]
    )


def _sacrebleu(
    metric: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Rows, CorpusScore, str]:
    from sacrebleu.metrics import BLEU, CHRF

    scorer = BLEU() if metric == "bleu" else CHRF()
    most = max(map(len, references))
    # sacrebleu wants one stream a reference number; a text with fewer references has None there.
    streams: Any = [[group[place] if place < len(group) else None for group in references] for place in range(most)]
    # The per-sentence statistics that sacrebleu's own significance tests resample; a test holds that their
    # sum gives the corpus score.
    rows = np.array(scorer._extract_corpus_statistics(list(hypotheses), streams), dtype=np.float64)

    def corpus_score(sums: Rows) -> float:
        return float(scorer._compute_score_from_stats([round(value) for value in sums]).score)

    return rows, corpus_score, f"{metric}|{scorer.get_signature()}"
