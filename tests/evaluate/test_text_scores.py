"""Scores against direct calls of sacrebleu and rouge-score, on real translations and summaries."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from fitune.errors import FituneError
from fitune.evaluate.text_scores import compare_texts, text_scores


def spoiled(text: str, every: int) -> str:
    """A plausible bad output: every n-th word is dropped and the one after it repeated."""
    words = text.split()
    return " ".join(word for place, word in enumerate(words) if place % every)


@pytest.fixture(scope="module")
def translations(shared_data: Path) -> list[str]:
    file = shared_data / "multi30k_de_en" / "raw" / "test_2016_flickr.en.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [line.rstrip("\n") for line in lines][:200]


def test_bleu_and_chrf_are_sacrebleus(translations: list[str]) -> None:
    outputs = [spoiled(line, 4) for line in translations]
    found = text_scores(outputs, translations, resamples=300)
    bleu, chrf = BLEU(), CHRF()
    assert found["bleu"].interval.value == pytest.approx(bleu.corpus_score(outputs, [translations]).score, abs=1e-9)
    assert found["chrf"].interval.value == pytest.approx(chrf.corpus_score(outputs, [translations]).score, abs=1e-9)
    assert found["bleu"].signature == f"bleu|{bleu.get_signature()}"
    assert "version:" in found["chrf"].signature
    for score in found.values():
        assert score.interval.low <= score.interval.value <= score.interval.high
    # sacrebleu's own bootstrap: mean and half width of the same interval, up to its and our draws.
    theirs = BLEU().corpus_score(outputs, [translations], n_bootstrap=1000)
    half = (found["bleu"].interval.high - found["bleu"].interval.low) / 2
    assert half == pytest.approx(theirs._ci, rel=0.25)


def test_rouge_is_rouge_scores(shared_data: Path) -> None:
    lines = (shared_data / "scitldr" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    papers = [json.loads(line) for line in lines]
    outputs = [paper["source"][0] for paper in papers]
    references = [paper["target"] for paper in papers]
    found = text_scores(outputs, references, metrics=["rouge_l", "bleu"], resamples=100)
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(target, output)["rougeL"].fmeasure for target in targets)
        for output, targets in zip(outputs, references, strict=True)
    ]
    assert found["rouge_l"].interval.value == pytest.approx(sum(best) / len(best), abs=1e-12)
    assert any(len(targets) > 1 for targets in references)
    streams = [
        [targets[place] if place < len(targets) else None for targets in references]
        for place in range(max(map(len, references)))
    ]
    assert found["bleu"].interval.value == pytest.approx(BLEU().corpus_score(outputs, streams).score, abs=1e-9)


def test_comparison_is_paired(translations: list[str]) -> None:
    worse, better = [spoiled(line, 3) for line in translations], [spoiled(line, 6) for line in translations]
    found = compare_texts(worse, better, translations, resamples=200)
    one, two = (text_scores(texts, translations, resamples=10) for texts in (worse, better))
    for metric in ("bleu", "chrf", "rouge_l"):
        difference = two[metric].interval.value - one[metric].interval.value
        assert found[metric].difference == pytest.approx(difference)
        assert 0 < found[metric].low < difference < found[metric].high
        assert found[metric].p_value < 0.05
    assert found["exact_match"].p_method == "McNemar exact"
    same = compare_texts(worse, worse, translations, metrics=["bleu"], resamples=200)["bleu"]
    assert same.difference == 0
    assert same.p_value == 1.0


def test_exact_match_and_bad_calls() -> None:
    found = text_scores([" a b ", "c", ""], ["a b", ["x", "c"], "y"], metrics=["exact_match"])["exact_match"]
    assert found.interval.value == pytest.approx(2 / 3)
    assert found.interval.method == "Wilson"
    assert text_scores(["", "word"], ["something", "else"], resamples=10)["bleu"].interval.value == 0.0
    with pytest.raises(FituneError, match="0 texts"):
        text_scores([], [])
    with pytest.raises(FituneError, match="2 texts cannot be scored against 1"):
        text_scores(["a", "b"], ["a"])
    with pytest.raises(FituneError, match="without a reference"):
        text_scores(["a"], [[]])
    with pytest.raises(FituneError, match="no such text metric: meteor"):
        text_scores(["a"], ["a"], metrics=["meteor"])
