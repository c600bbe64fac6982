from __future__ import annotations

from pathlib import Path

import pytest

from fitune.audit.audit_table import audit_page, read_results, worse
from fitune.audit.model_audit import audit_model
from fitune.audit.whole_audit import run_audit
from fitune.errors import InputError
from tiny_models import BACKEND

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
# Of each kind one: dense, windows and caps, latent attention with experts, state space, hybrid, transposed linears,
# positions from 2, a decoder of translation, experts as two-dimensional parameters.
SAMPLE = ["llama", "gemma2", "deepseek_v3", "mamba2", "qwen3_next", "gpt2", "roberta", "marian", "dbrx"]


def test_the_sample_is_as_the_page_says() -> None:
    rows = run_audit(SAMPLE, BACKEND, processes=2)
    now = read_results(audit_page([row.as_dict() for row in rows], "this"))
    assert list(now) == SAMPLE
    before = read_results(PAGE.read_text(encoding="utf-8"))
    assert not worse(before, now), "; ".join(worse(before, now))
    assert [before[name][0] for name in SAMPLE] == ["passes"] * len(SAMPLE)


@pytest.mark.slow
def test_nothing_got_worse() -> None:
    before = read_results(PAGE.read_text(encoding="utf-8"))
    rows = run_audit(list(before), BACKEND, processes=2)
    now = read_results(audit_page([row.as_dict() for row in rows], "this"))
    assert not worse(before, now), "; ".join(worse(before, now))
    assert sum(row[0] == "passes" for row in now.values()) >= 150


def test_what_got_worse_is_told() -> None:
    row = audit_model("llama", BACKEND).as_dict()
    assert row["passed"], row
    good = read_results(audit_page([row], "this"))
    failing = {**row, "passed": False, "failures": ["logits differ by 1.0e+00"], "packs": False}
    bad = read_results(audit_page([{**failing, "replaced": {**row["replaced"], "mlp": 1}}], "this"))
    assert worse(good, bad) == [
        "llama: passed, and now: **fails**",
        "llama: could be packed, and cannot now",
        "llama: 2 of mlp were fused, and now 1",
    ]  # fmt: skip
    assert not worse(bad, good)


def test_a_type_that_is_none() -> None:
    with pytest.raises(InputError, match="'lama' is no model type"):
        run_audit(["llama", "lama"], BACKEND, processes=1)
    assert audit_model("musicgen", BACKEND).reason
    assert not audit_model("musicgen", BACKEND).passed


def test_a_type_whose_model_cannot_be_built_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from fitune.audit import model_audit

    def broken(model_type: str) -> None:
        raise ValueError(f"no sizes for {model_type}")

    monkeypatch.setattr(model_audit, "tiny_config", broken)
    row = audit_model("llama", BACKEND)
    assert (row.passed, row.reason) == (False, "ValueError: no sizes for llama")
