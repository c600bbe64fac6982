"""A model's own dropout: found in its configuration, set, and at work in training whatever is fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fitune.audit.tiny_configs import tiny_config
from fitune.data.collation import collate
from fitune.errors import InputError
from fitune.fuse.attention import obstacle
from fitune.models.dropout import attention_dropout_of, dropout_of, set_dropout, told
from tiny_models import adapted, random_samples

FIELDS = {
    "gpt2": {"attn_pdrop", "embd_pdrop", "resid_pdrop"}, "opt": {"attention_dropout", "dropout"},
    "phi": {"attention_dropout", "embd_pdrop", "resid_pdrop"}, "llama": {"attention_dropout"},
    "gpt_neox": {"attention_dropout", "hidden_dropout"}, "mamba": set(),
    "biogpt": {"activation_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"},
    "gemma3_text": {"attention_dropout"},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(FIELDS))
def test_every_rate_is_found_and_set(kind: str) -> None:
    config = tiny_config(kind)
    assert set(dropout_of(config)) == FIELDS[kind]
    before = dropout_of(config)
    set_dropout(config, None)
    assert dropout_of(config) == before
    if not FIELDS[kind]:
        set_dropout(config, 0.0)
        with pytest.raises(InputError, match="type mamba has no dropout of its own"):
            set_dropout(config, 0.25)
        return
    set_dropout(config, 0.25)
    assert set(dropout_of(config).values()) == {0.25}
    assert attention_dropout_of(config) == 0.25
    assert told(config).count("0.25") == len(FIELDS[kind])
    set_dropout(config, 0.0)
    assert not told(config)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind, fields in FIELDS.items() if fields])
def test_it_is_at_work_in_training_and_only_there(kind: str) -> None:
    config = tiny_config(kind)
    set_dropout(config, 0.3)
    torch.manual_seed(0)
    graph: Any = AutoModelForCausalLM.from_config(config).float()
    assert obstacle(graph) is not None
    model, _ = adapted(graph)
    assert model is not None
    batch = collate([random_samples([30])], 512, 0)

    def loss(seed: int, training: bool) -> float:
        graph.train(training)
        torch.manual_seed(seed)
        return float(model.logprobs(batch)[0].sum())

    assert abs(loss(1, True) - loss(2, True)) > 1e-3
    assert loss(1, True) == loss(1, True)
    assert loss(1, False) == loss(2, False)
    assert abs(loss(1, True) - loss(1, False)) > 1e-3
