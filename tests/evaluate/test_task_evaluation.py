"""Evaluation of a task against plain transformers: the same numbers, base and tuned in one model, nothing changed."""

from __future__ import annotations

import hashlib
import math
import sqlite3
from pathlib import Path

import pytest
import torch
import transformers

from fitune.adapters.lora import inject
from fitune.data.conversation import Message, Origin, Sample
from fitune.data.encoding import encode, encode_prompt
from fitune.errors import FituneError, InputError
from fitune.evaluate.task_evaluation import (
    TaskEvaluation,
    check_samples,
    compare_evaluations,
    correct_of,
    evaluate_task,
)
from fitune.fuse.adapter_layers import fused_lora_layer
from fitune.fuse.model import FusedModel, prepare
from fitune.generate.stopping import stop_ids
from fitune.models.find import find_model
from fitune.models.graph import head_name

SOURCE = find_model("bundled")
TOKENIZER = SOURCE.tokenizer()
EOS = stop_ids(SOURCE, TOKENIZER)


def samples(*answers: str) -> list[Sample]:
    return [
        Sample((Message("user", f"Question {n}?"), Message("assistant", answer)), origin=Origin("q.jsonl", n + 1))
        for n, answer in enumerate(answers)
    ]


def plain_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture
def model() -> FusedModel:
    """A tiny model with a trained adapter, in training mode."""
    graph = plain_model()
    adapted = inject(
        graph, head_name(graph), rank=4, alpha=8.0, dropout=0.0, targets="all-linear", rslora=False, seed=0,
        base_name="tiny", layer=fused_lora_layer,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    fused = prepare(graph, adapted, torch.float32, "reference")
    graph.train()
    return fused


def token_by_token(model: torch.nn.Module, given: list[Sample]) -> float:
    """The mean loss over trained tokens, one sample and one forward at a time."""
    nats, count = 0.0, 0
    for sample in given:
        encoded = encode(sample, TOKENIZER)
        with torch.no_grad():
            logits = model(torch.tensor([encoded.tokens])).logits[0].double().log_softmax(-1)
        for place, is_trained in enumerate(encoded.trained):
            if is_trained:
                nats -= float(logits[place - 1, encoded.tokens[place]])
                count += 1
    return nats / count


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


GIVEN = samples("4", "a much longer answer than the others", "no", "SELECT 1")


def test_the_loss_is_that_of_plain_transformers_with_and_without_the_adapter(model: FusedModel) -> None:
    base = evaluate_task(model, TOKENIZER, GIVEN, "perplexity", eos_ids=EOS, with_adapter=False, batch_size=3)
    tuned = evaluate_task(model, TOKENIZER, GIVEN, "perplexity", eos_ids=EOS, batch_size=3)
    assert base.scores["loss"].value == pytest.approx(token_by_token(plain_model(), GIVEN), rel=1e-5)
    assert model.adapted is not None
    model.graph.eval()
    assert tuned.scores["loss"].value == pytest.approx(token_by_token(model.adapted, GIVEN), rel=1e-5)
    assert abs(tuned.scores["loss"].value - base.scores["loss"].value) > 0.1
    assert tuned.scores["perplexity"].value == pytest.approx(math.exp(tuned.scores["loss"].value))
    change = compare_evaluations(base, tuned)["loss"]
    assert change.difference == pytest.approx(tuned.scores["loss"].value - base.scores["loss"].value)


def test_answers_without_the_adapter_are_the_plain_model_s(model: FusedModel) -> None:
    found = evaluate_task(
        model, TOKENIZER, GIVEN, "text", eos_ids=EOS, max_new_tokens=6, with_adapter=False, batch_size=3
    )
    plain = plain_model()
    for sample, answer in zip(GIVEN, found.answers, strict=True):
        prompt = torch.tensor([encode_prompt(sample.messages[:-1], TOKENIZER)])
        tokens = plain.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=EOS, pad_token_id=0)
        new = tokens[0, prompt.shape[1] :].tolist()
        expected = TOKENIZER.decode([t for t in new if t not in EOS], skip_special_tokens=True).strip()
        assert answer.text == expected
        assert answer.finished == (new[-1] in EOS)
    tuned = evaluate_task(model, TOKENIZER, GIVEN, "text", eos_ids=EOS, max_new_tokens=6)
    assert [answer.text for answer in tuned.answers] != [answer.text for answer in found.answers]
    assert set(tuned.scores) == {"bleu", "chrf", "rouge_l", "exact_match"}
    assert tuned.new_tokens > 0


@pytest.mark.parametrize("task", ["text", "perplexity"])
@pytest.mark.parametrize("with_adapter", [True, False])
def test_evaluation_changes_nothing(model: FusedModel, task: str, with_adapter: bool) -> None:
    model.graph.get_decoder().layers[1].eval()
    training = [module.training for module in model.graph.modules()]
    learning = [parameter.requires_grad for parameter in model.graph.parameters()]
    before = digest(model.graph)
    evaluate_task(
        model, TOKENIZER, GIVEN[:2], task, eos_ids=EOS, max_new_tokens=3, with_adapter=with_adapter  # type: ignore[arg-type]
    )  # fmt: skip
    assert digest(model.graph) == before
    assert [module.training for module in model.graph.modules()] == training
    assert [parameter.requires_grad for parameter in model.graph.parameters()] == learning
    with torch.no_grad():
        next(model.graph.parameters()).view(-1)[0] += 1e-3
    assert digest(model.graph) != before  # the digest would have seen it


def test_a_frozen_adapter_stays_frozen(model: FusedModel) -> None:
    for parameter in model.graph.parameters():
        parameter.requires_grad_(False)
    evaluate_task(model, TOKENIZER, GIVEN[:1], "perplexity", eos_ids=EOS, with_adapter=False)
    assert not model.trainable


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE item (name TEXT)")
    connection.close()
    return path


def test_sql_answers_are_judged_on_the_database(model: FusedModel, database: Path) -> None:
    found = evaluate_task(
        model, TOKENIZER, samples("SELECT 1", "SELECT name FROM item"), "sql", eos_ids=EOS, database=database,
        max_new_tokens=4,
    )  # fmt: skip
    assert len(correct_of(found)) == 2
    assert found.scores["execution_accuracy"].count == 2
    assert all(answer.outcome is not None for answer in found.answers)


def test_all_bad_samples_are_named_before_anything_is_generated(database: Path) -> None:
    bad = [*samples("SELECT name FROM item", "SELECT nothing FROM item", "DROP TABLE item")]
    with pytest.raises(InputError) as caught:
        check_samples(bad, "sql", database)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["q.jsonl line 2", "q.jsonl line 3"]
    texts = [Sample(text="plain"), Sample((Message("user", "only a question"),))]
    with pytest.raises(InputError) as caught:
        check_samples([*texts, *bad[:1]], "text", None)
    assert len(caught.value.problems) == 2
    with pytest.raises(InputError, match="--database"):
        check_samples(bad[:1], "sql", None)
    with pytest.raises(InputError, match="no samples"):
        check_samples([], "perplexity", None)
    check_samples(texts, "perplexity", None)


def test_only_like_is_compared_with_like() -> None:
    one = TaskEvaluation("text", {}, 2, 0.0)
    with pytest.raises(FituneError):
        compare_evaluations(one, TaskEvaluation("sql", {}, 2, 0.0))
