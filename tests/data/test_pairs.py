"""Preference pairs on their way to a batch: what is laid down once, what is trained, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.config.schema import RunConfig
from fitune.data.collation import collate
from fitune.data.conversation import Message, Sample
from fitune.data.dataset import examine_data, load_training_data
from fitune.data.encoding import EncodedSample, encode
from fitune.data.formats import recognise
from fitune.data.order import epoch_rows
from fitune.data.reading import read_samples
from fitune.data.token_table import Samples
from fitune.errors import InputError


def turns(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("assistant" if place % 2 else "user", text) for place, text in enumerate(texts))


def written(path: Path, count: int = 40) -> Path:
    lines = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No. " * (1 + n % 5)} for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def config(path: Path, objective: str = "dpo", **data: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": str(path), **data}, "train": {"objective": objective}})


def test_both_answers_are_trained_and_what_they_share_is_there_once(smollm2_tokenizer: Any) -> None:
    """Whatever the conversation: the tokens of each answer's conversation are those of that conversation alone."""
    for asked, better, worse in (
        (turns("What is 1?"), "It is 1.", "It is 2, or more."),
        (turns("What is 1?", "It is 1.", "And 2?"), "It is 2.", "It is"),
        (turns("What is 1?"), "It", "It is 1."),
        (turns(""), "", "No."),
    ):
        pair = Sample((*asked, Message("assistant", better)), rejected=(*asked, Message("assistant", worse)))
        encoded = encode(pair, smollm2_tokenizer)
        start, fork = encoded.worse_from, encoded.fork
        halves = (
            (encoded.tokens[:start], encoded.trained[:start]),
            (encoded.tokens[:fork] + encoded.tokens[start:], encoded.trained[:fork] + encoded.trained[start:]),
        )
        for (tokens, trained), answer in zip(halves, (better, worse), strict=True):
            alone = encode(
                Sample((*asked, Message("assistant", answer))), smollm2_tokenizer, train_on="last_assistant"
            )
            assert (tokens, trained) == (alone.tokens, alone.trained)
        assert fork == alone.trained.index(True) - 1
        assert not any(encoded.trained[: fork + 1])
        assert not encoded.without_end_token


def test_an_answer_that_is_the_beginning_of_the_other_is_refused(smollm2_tokenizer: Any) -> None:
    shorter, longer = turns("What is 1?", "It is 1."), turns("What is 1?", "It is 1.", "And 2?", "It is 2.")
    for better, worse, told in ((shorter, longer, "better"), (longer, shorter, "worse")):
        with pytest.raises(InputError, match=f"the {told} answer has no token of its own"):
            encode(Sample(better, rejected=worse), smollm2_tokenizer)


def test_a_system_message_is_put_before_both(smollm2_tokenizer: Any) -> None:
    pair = Sample(turns("What is 1?", "It is 1."), rejected=turns("What is 1?", "No."))
    encoded = encode(pair, smollm2_tokenizer, system="Be brief.")
    text = smollm2_tokenizer.decode(encoded.tokens)
    assert text.count("Be brief.") == 1
    assert text.count("What is 1?") == 1


def test_real_pairs_go_into_rows_and_documents(shared_data: Path, smollm2_tokenizer: Any) -> None:
    samples = [
        encode(sample, smollm2_tokenizer)
        for sample in read_samples(shared_data / "llamafactory_demo" / "dpo_en_demo.json")
    ]
    kept = [sample for sample in samples if len(sample) <= 1024]
    assert len(kept) > 150
    table = Samples.of(kept)
    assert [(one.worse_from, one.fork) for one in table] == [(one.worse_from, one.fork) for one in kept]
    seen = []
    for row in epoch_rows(table, 1024, 1, seed=3, epoch=0, pack=True, share=False):
        members = [table[number] for number in row.samples]
        batch = collate([members], 1024, 0, [row.shared])
        assert len(batch.pairs) == len(members)
        for sample, (better, worse) in zip(members, batch.pairs.tolist(), strict=True):
            one, other = batch.documents[better], batch.documents[worse]
            assert one[3:].tolist() == other[3:].tolist()
            for document, length in (
                (one, sample.worse_from),
                (other, sample.fork + len(sample) - sample.worse_from),
            ):
                own = slice(int(document[1]), int(document[2]))
                assert batch.positions[0, own].tolist() == list(range(sample.fork, length))
            places = torch.cat([torch.arange(int(d[1]), int(d[2])) for d in (one, other)])
            assert int(batch.weights[0, places].sum()) == sample.trained_tokens
            assert batch.document_of(places).unique().tolist() == [better, worse]
        seen += row.samples
    assert sorted(seen) == list(range(len(kept)))


def test_pairs_stay_whole_in_a_split_and_are_counted_as_one(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = written(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "\n" + path.read_text(), encoding="utf-8")
    found = load_training_data(config(path, validation=0.25).data, smollm2_tokenizer, objective="dpo")
    assert (found.report.samples, found.report.duplicates) == (80, 40)
    assert (len(found.train), len(found.validation)) == (60, 20)
    assert all(sample.worse_from for sample in (*found.train, *found.validation))
    assert not {one.tokens for one in found.train} & {one.tokens for one in found.validation}
    view = found.report.views[0]
    assert [(piece.text, piece.is_worse) for piece in view.pieces if piece.is_trained] == [
        ("It is 0.<|im_end|>", False), ("No. <|im_end|>", True),
    ]  # fmt: skip


def test_what_an_objective_cannot_learn_from_is_refused(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    pairs = written(tmp_path / "pairs.jsonl", 4)
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"question": "What is 1?", "answer": "It is 1."}), encoding="utf-8")
    judged = tmp_path / "judged.jsonl"
    judged.write_text(json.dumps({"prompt": "What is 1?", "completion": "It is 1.", "label": True}), encoding="utf-8")
    for path, objective, told in (
        (pairs, "supervised", r"pairs\.jsonl: these are preference pairs, .*supervised .*; set it to dpo or orpo"),
        (plain, "orpo", r"plain\.jsonl: these are samples of the format question_answer.*orpo.*supervised"),
        (
            judged,
            "dpo",
            r"judged\.jsonl: these are answers labelled good or bad, .* dpo .*; set it to kto",
        ),
    ):
        with pytest.raises(InputError, match=told):
            load_training_data(config(path).data, smollm2_tokenizer, objective=objective)
    mixed = RunConfig.model_validate({"data": {"train": [str(pairs), str(plain)]}})
    assert examine_data(config(pairs).data, smollm2_tokenizer, objective=None).refusals == ()
    (refusal,) = examine_data(mixed.data, smollm2_tokenizer, objective=None).refusals
    assert "a run learns from one kind" in str(refusal)


def test_a_pair_that_is_too_long_is_dropped_or_refused_and_never_cut(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = tmp_path / "long.jsonl"
    lines = [{"prompt": "Say it.", "chosen": "yes " * count, "rejected": "no " * 40} for count in (3, 60)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for policy in ("error", "cut"):
        with pytest.raises(InputError, match=r"line 2: 1\d\d tokens"):
            load_training_data(
                config(path, max_tokens=100, over_length=policy).data, smollm2_tokenizer, objective="dpo"
            )
    found = load_training_data(
        config(path, max_tokens=100, over_length="drop").data, smollm2_tokenizer, objective="dpo"
    )
    assert (found.report.dropped, len(found.train)) == (1, 1)


def test_a_pair_shares_nothing_with_its_neighbours() -> None:
    one = EncodedSample(tuple(range(30)), (False,) * 20 + (True,) * 10, worse_from=25, fork=19)
    with pytest.raises(ValueError, match="pairs and judged answers share nothing"):
        collate([[one, one]], 64, 0, [[(0, 16), (0, 16)]])


def test_a_judgement_is_of_the_last_answer(shared_data: Path, smollm2_tokenizer: Any) -> None:
    judged = Sample(turns("What is 1?", "It is 1.", "And 2?", "It is 3."), label=False)
    encoded = encode(judged, smollm2_tokenizer)
    assert encoded.label is False
    trained = [token for token, flag in zip(encoded.tokens, encoded.trained, strict=True) if flag]
    assert smollm2_tokenizer.decode(trained) == "It is 3.<|im_end|>"
    path = shared_data / "llamafactory_demo" / "kto_en_demo.json"
    settings = config(path, "kto", max_tokens=2048, over_length="drop")
    found = load_training_data(settings.data, smollm2_tokenizer, objective="kto")
    labels = [sample.label for sample in found.train]
    assert {*labels} == {True, False}
    batch = collate([[found.train[0]], [found.train[1]]], 2048, 0)
    assert [sign for sign in batch.labels.tolist() if sign] == [1 if label else -1 for label in labels[:2]]


def test_an_answer_that_is_both_good_and_bad_is_told(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    lines = [
        {"prompt": "What is 1?", "completion": "It is 1.", "label": True},
        {"prompt": "What is 2?", "completion": "It is 2.", "label": 1},
        {"question": "What is 1?", "answer": "It is 1.", "label": False},
        {"prompt": "What is 2?", "completion": "It is 2.", "label": True},
    ]
    path = tmp_path / "judged.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    settings = config(path, "kto", train=[{"path": str(path), "format": "kto"}])
    found = load_training_data(settings.data, smollm2_tokenizer, objective="kto")
    assert found.train.labels().tolist() == [2, 2, 1, 2]
    told = [str(problem) for problem in found.report.problems]
    assert any("line 3" in one and "the same answer, labelled otherwise, as" in one for one in told), told
    assert any("line 4" in one and "the same sample as" in one for one in told), told


def test_a_label_beside_any_question_is_noticed() -> None:
    assert recognise({"question": "q", "answer": "a", "label": False}) == "kto"
    assert recognise({"question": "q", "answer": "a", "label": 0}) == "question_answer"
