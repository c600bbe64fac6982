"""Sentencepiece models against the sentencepiece library itself: the ids must be the same for every text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tiny_originals import REPOSITORY, ROLE_TOKENS, train_vocabulary

from fitune.errors import InputError
from fitune.models.sentencepiece_tokenizer import SentencePieceVocabulary

TEXTS = [
    "",
    " ",
    "   leading   and  trailing  \n\n\t tabs\t\t",
    "\n\n\n",
    "Hello world 12345 67.8 and 2024-11-21",
    "SELECT * FROM t WHERE a='x''y' AND b>=2023;\r\n",
    "foo_bar(baz)->qux::quux<T>\n        return x+1;",
    "中文字符测试,你好世界。百川智能，１２３４５",
    "日本語 と ελληνικά Привет عربي",
    "🦙🚀 emoji é ñ ü Ünïcödé e\u0301 ﬁ",
    "a\u2581b \u2581 \u00a0nbsp\u2003em",
    "<0x41><unused> <reserved_106> x<reserved_107>",
    "aaaaaaaaaaaaa-----------==========          end",
    "\ufffd\u200b\x00\x7f",
]
BLANKS = ["\u2581" * count for count in range(2, 9)]
KINDS: dict[str, dict[str, Any]] = {
    "chatglm": {},
    "baichuan": {"symbols": [*ROLE_TOKENS, *BLANKS], "add_dummy_prefix": False},
    "blanks as symbols, prefix": {"symbols": BLANKS},
    "blanks removed": {"remove_extra_whitespaces": True},
    "no bytes": {"byte_fallback": False},
}


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Cuts of real text, with runs of blanks, letters and odd characters in between."""
    drawn = random.Random(seed)
    text = (REPOSITORY / "README.zh.md").read_text(encoding="utf-8") + (REPOSITORY / "README.md").read_text(
        encoding="utf-8"
    )
    made = []
    for _ in range(count):
        parts = []
        for _ in range(drawn.randint(1, 6)):
            start = drawn.randrange(len(text))
            parts.append(text[start : start + drawn.randint(1, 60)])
            parts.append(drawn.choice([" ", "\n", "a", "-", "0", "的", "\t", "龘", "😀"]) * drawn.randint(0, 12))
        made.append("".join(parts))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_equal_the_librarys(tmp_path: Path, kind: str) -> None:
    path = train_vocabulary(tmp_path, **KINDS[kind])
    library = SentencePieceProcessor(model_file=str(path))
    tokenizer = SentencePieceVocabulary(path).tokenizer()
    for text in [*TEXTS, *random_texts(1000)]:
        expected = library.encode(text)
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == _shown(library, expected), text


def _shown(library: SentencePieceProcessor, ids: list[int]) -> str:
    """The library writes the unknown token as a sign of its own."""
    return library.decode(ids).replace(" \u2047 ", "<unk>")


def test_a_prefix_too_many_would_be_noticed(tmp_path: Path) -> None:
    path = train_vocabulary(tmp_path)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    library = SentencePieceProcessor(model_proto=model.SerializeToString())
    assert SentencePieceVocabulary(path).tokenizer().encode("Hello").ids != library.encode("Hello")


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Any:
    """A vocabulary of a GGUF file as the sentencepiece model that it was made from."""
    fields = gguf.GGUFReader(str(shared_data / "vocab_gguf" / "ggml-vocab-baichuan.gguf")).fields
    tokens, scores, types = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, type_ in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=type_)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.remove_extra_whitespaces = False
    return model


@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_real_vocabulary_of_64000_pieces_equals_the_librarys(
    tmp_path: Path, shared_data: Path, real: Any, has_prefix: bool
) -> None:
    real.normalizer_spec.add_dummy_prefix = has_prefix
    path = tmp_path / "tokenizer.model"
    path.write_bytes(real.SerializeToString())
    library = SentencePieceProcessor(model_file=str(path))
    tokenizer = SentencePieceVocabulary(path).tokenizer()
    assert library.get_piece_size() == 64000
    talk = json.loads((shared_data / "llamafactory_demo" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    texts = [part for entry in talk[:150] for part in (entry["instruction"], entry["output"])]
    for text in [*TEXTS, *random_texts(300), *texts]:
        assert tokenizer.encode(text).ids == library.encode(text), text


def test_special_tokens_follow_the_vocabulary(tmp_path: Path) -> None:
    path = train_vocabulary(tmp_path)
    vocabulary = SentencePieceVocabulary(path)
    tokenizer = vocabulary.tokenizer(["[a]", "<b>"], begin=["[a]", "<b>"], end=["</s>"])
    size = len(vocabulary.pieces)
    library = SentencePieceProcessor(model_file=str(path))
    assert tokenizer.encode("x y").ids == [size, size + 1, *library.encode("x y"), 2]
    assert tokenizer.encode("x<b>y", add_special_tokens=False).ids == [
        *library.encode("x"),
        size + 1,
        *library.encode("y"),
    ]
    pair = tokenizer.encode("x", "y")
    assert pair.ids == [size, size + 1, *library.encode("x"), 2, size, size + 1, *library.encode("y"), 2]


def test_user_defined_symbols_can_be_special(tmp_path: Path) -> None:
    path = train_vocabulary(tmp_path, symbols=["<tool>"])
    library = SentencePieceProcessor(model_file=str(path))
    tokenizer = SentencePieceVocabulary(path).tokenizer(["<tool>"])
    symbol = library.piece_to_id("<tool>")
    assert tokenizer.encode("call x").ids == library.encode("call x")
    assert tokenizer.encode("x<tool>y").ids == [*library.encode("x"), symbol, *library.encode("y")]
    tokenizer.encode_special_tokens = True
    assert symbol not in tokenizer.encode("x<tool>y").ids


def altered(path: Path, change: Any) -> Path:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({"model_type": "unigram"}, None, "a unigram model"),
        ({"treat_whitespace_as_suffix": True}, None, "before words"),
        ({"normalization_rule_name": "nmt_nfkc"}, None, r"by a table \(nmt_nfkc\)"),
        ({"symbols": ["<tool>"]}, None, r"1 user-defined symbols .*'<tool>'"),
        ({"symbols": ["a\u2581b"], "add_dummy_prefix": False}, None, "has a blank beside"),
        ({}, lambda model: setattr(model.pieces[600], "type", 5), "1 pieces are marked unused"),
        ({}, lambda model: setattr(model.pieces[600], "piece", "鿿龘"), "a character that is no piece"),
        ({"symbols": ["\u2581" * 7], "allow_whitespace_only_pieces": False}, None, "run of 7 blanks"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused(
    tmp_path: Path, settings: dict[str, Any], change: Any, words: str
) -> None:
    path = train_vocabulary(tmp_path, **settings)
    if change is not None:
        altered(path, change)
    with pytest.raises(InputError, match=words):
        SentencePieceVocabulary(path).tokenizer()


def test_what_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match="missing"):
        SentencePieceVocabulary(path)
    for content in (b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff\xff"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="no sentencepiece model"):
            SentencePieceVocabulary(path)
