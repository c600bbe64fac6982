"""Tiktoken vocabularies against byte-pair merging written out plainly."""

from __future__ import annotations

import base64
import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import regex
from tiny_originals import CHATGLM, REPOSITORY, draw_chatglm, write_folder

from fitune.data.conversation import Message, Sample
from fitune.data.encoding import encode
from fitune.errors import InputError
from fitune.models.chatglm import SPECIAL_TOKENS_4, SPLIT_4, ChatGLMSource
from fitune.models.tiktoken_tokenizer import TiktokenVocabulary

TEXTS = [
    "",
    "   leading   and  trailing  \n\n\t tabs\t\t",
    "Hello world 12345 don't we'll I'M",
    "中文字符测试,你好世界。１２３４５",
    "🦙🚀 emoji é e\u0301 ﬁ \u00a0nbsp",
    "aaaaaaaaaaaaa-----------==========          end",
]


def joined(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The pair of lowest rank first, the leftmost of equals (https://github.com/openai/tiktoken)."""
    parts = [bytes([byte]) for byte in piece]
    while piece not in ranks or len(parts) > 1:
        if piece in ranks:
            return [ranks[piece]]
        pairs = [(ranks.get(left + right), place) for place, (left, right) in enumerate(itertools.pairwise(parts))]
        known = [(rank, place) for rank, place in pairs if rank is not None]
        if not known:
            break
        place = min(known)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [ranks[part] for part in parts]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Learnt from the project's own pages: the commonest pair is joined, 600 times."""
    text = "".join((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.zh.md", "README.md"))
    words = Counter(tuple(bytes([byte]) for byte in piece.encode()) for piece in regex.findall(SPLIT_4, text))
    found = {bytes([byte]): byte for byte in range(256)}
    for _ in range(600):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        left, right = pairs.most_common(1)[0][0]
        found[left + right] = len(found)
        grown: Counter[tuple[bytes, ...]] = Counter()
        for word, count in words.items():
            parts = list(word)
            place = 0
            while place + 1 < len(parts):
                if parts[place] == left and parts[place + 1] == right:
                    parts[place : place + 2] = [left + right]
                place += 1
            grown[tuple(parts)] += count
        words = grown
    return found


def write(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def test_ids_equal_plain_merging(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    tokenizer = TiktokenVocabulary(write(tmp_path / "tokenizer.model", ranks)).tokenizer(
        SPLIT_4, {"<end>": len(ranks)}
    )
    drawn = random.Random(0)
    text = (REPOSITORY / "README.zh.md").read_text(encoding="utf-8")
    starts = [drawn.randrange(len(text)) for _ in range(200)]
    for each in [*TEXTS, *(text[start : start + drawn.randint(1, 80)] for start in starts)]:
        expected = [token for piece in regex.findall(SPLIT_4, each) for token in joined(piece.encode(), ranks)]
        assert tokenizer.encode(each).ids == expected, each
        assert tokenizer.decode(expected) == each
    assert tokenizer.encode("a<end>").ids == [97, len(ranks)]


def test_an_old_glm_4_folder_has_its_own_tokens_and_template(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    config = {**CHATGLM, "eos_token_id": None, "rope_ratio": 500}
    folder = write_folder(tmp_path / "model", config, draw_chatglm(config), write(tmp_path / "file", ranks))
    source = ChatGLMSource(folder)
    tokenizer = source.tokenizer()
    first = len(ranks)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS_4)) == list(range(first, first + 14))
    ids = dict(zip(SPECIAL_TOKENS_4, range(first, first + 14), strict=True))
    assert source.generation_eos_ids() == [ids["<|endoftext|>"], ids["<|user|>"], ids["<|observation|>"]]
    encoded = encode(Sample(messages=(Message("user", "你好"), Message("assistant", "Hi"))), tokenizer)

    def plain(text: str) -> list[int]:
        return [token for piece in regex.findall(SPLIT_4, text) for token in joined(piece.encode(), ranks)]

    answer = [*plain("\nHi"), ids["<|user|>"]]
    asked = [ids["[gMASK]"], ids["<sop>"], ids["<|user|>"], *plain("\n你好"), ids["<|assistant|>"]]
    assert list(encoded.tokens) == [*asked, *answer]
    assert list(encoded.trained) == [False] * len(asked) + [True] * len(answer)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"IQ== 0\nIg== 2\n", "without a gap"),
        (b"IQ== 0\nIg== 1\n", "254 bytes are no tokens"),
        (b"IQ== zero\n", "no tiktoken vocabulary"),
        (b"?? 0\n", "no tiktoken vocabulary"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        TiktokenVocabulary(path)


def test_special_tokens_with_a_gap_are_refused(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    vocabulary = TiktokenVocabulary(write(tmp_path / "tokenizer.model", ranks))
    with pytest.raises(InputError, match="comes next"):
        vocabulary.tokenizer(SPLIT_4, {"<end>": len(ranks) + 3})
