"""The audit must see every one of these mistakes: each changes one thing that families differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.audit import model_audit
from fitune.audit.model_audit import TOLERANCE, AuditRow
from fitune.audit.tiny_configs import tiny_config
from fitune.fuse.norm import FusedNorm
from fitune.models.folder import FolderSource
from tiny_models import BACKEND


def audit_of(model_type: str, place: Path) -> Any:
    return model_audit._Audit(AuditRow(model_type), tiny_config(model_type), place, BACKEND)


def rope(config: Any, **changes: Any) -> None:
    parameters = config.rope_parameters
    each = parameters.values() if "rope_theta" not in parameters else [parameters]
    for one in each:
        one.update(changes)


def theta_off_by_a_hundredth(config: Any) -> None:
    rope(config, rope_theta=10_100.0)


def full_instead_of_partial_rotary(config: Any) -> None:
    rope(config, partial_rotary_factor=1.0)


def missing_soft_cap_of_scores(config: Any) -> None:
    config.attn_logit_softcapping = None


def missing_soft_cap_of_logits(config: Any) -> None:
    config.final_logit_softcapping = None


def window_one_token_wider(config: Any) -> None:
    config.sliding_window += 1


def window_in_the_other_layers(config: Any) -> None:
    config.layer_types = config.layer_types[1:] + config.layer_types[:1]


def scale_of_embeddings_off_by_a_hundredth(config: Any) -> None:
    config.embedding_multiplier *= 1.01


def experts_not_normalised(config: Any) -> None:
    config.norm_topk_prob = not config.norm_topk_prob


MUTATIONS = [
    ("llama", theta_off_by_a_hundredth),
    ("stablelm", full_instead_of_partial_rotary),
    ("gemma2", missing_soft_cap_of_scores),
    ("gemma2", missing_soft_cap_of_logits),
    ("gemma2", window_in_the_other_layers),
    ("gemma3_text", window_one_token_wider),
    ("mistral", window_one_token_wider),
    ("granite", scale_of_embeddings_off_by_a_hundredth),
    ("olmoe", experts_not_normalised),
]


@pytest.mark.parametrize(("model_type", "mutate"), MUTATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_feature_is_seen(model_type: str, mutate: Any, tmp_path: Path) -> None:
    audit = audit_of(model_type, tmp_path)
    exact = audit._reference(torch.float32)
    ours = audit._ours(torch.float32)
    model_audit._copy_adapter(ours.graph, exact)
    expected = model_audit._reference_pass(exact, audit.batch)
    right = model_audit._our_pass(ours, audit.batch)
    assert model_audit._distance(right[0], expected[0]) < TOLERANCE

    class Mutated(FolderSource):
        @property
        def config(self) -> Any:
            config = tiny_config(model_type)
            mutate(config)
            return config

    audit.source = Mutated(tmp_path / "model")
    wrong = model_audit._our_pass(audit._ours(torch.float32), audit.batch)
    assert model_audit._distance(wrong[0], expected[0]) > 3 * TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "attribute", "wrong"), [("gemma", "shift", 0.0), ("llama", "eps", 1e-5), ("qwen3", "eps", 2e-6)]
)
def test_a_wrong_norm_is_not_accepted(
    model_type: str, attribute: str, wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = audit_of(model_type, tmp_path)
    assert "norm" in audit._ours(torch.float32).report.replaced
    right = FusedNorm.__init__

    def mutated(self: FusedNorm, weight: Any, eps: float, shift: float, backend: str) -> None:
        values = {"eps": eps, "shift": shift}
        assert values[attribute] != wrong or attribute == "shift"
        right(self, weight, backend=backend, **{**values, attribute: wrong})

    monkeypatch.setattr(FusedNorm, "__init__", mutated)
    report = audit._ours(torch.float32).report
    assert "norm" not in report.replaced
    assert any(part.startswith("norm") for part in report.left)
