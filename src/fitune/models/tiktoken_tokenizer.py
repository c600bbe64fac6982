"""A tiktoken vocabulary file as a `tokenizers` tokenizer that gives the very same ids.

One line a token: its bytes in base64, a blank, its rank, which is its id. Two neighbours are joined where the bytes
of both are a token, the lowest rank first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from fitune.errors import InputError


class TiktokenVocabulary:
    """A tiktoken file, e.g. GLM-4's `tokenizer.model`.

    Attributes:
        path: the file.
        ranks: the bytes of each token -> its id.

    Raises InputError where it is no such file, or ids are missing between 0 and the last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ranks: dict[bytes, int] = {}
        try:
            for line in path.read_bytes().splitlines():
                token, _, rank = line.partition(b" ")
                self.ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (OSError, ValueError, binascii.Error) as error:
            raise InputError(f"no tiktoken vocabulary, or a damaged one ({error})", where=path) from error
        if sorted(self.ranks.values()) != list(range(len(self.ranks))):
            raise InputError("the vocabulary's ids are not 0, 1, 2 and so on without a gap", where=path)
        lost = [byte for byte in range(256) if bytes([byte]) not in self.ranks]
        if lost:
            raise InputError(f"{len(lost)} bytes are no tokens (first: {lost[0]}), so some text has none", where=path)

    def tokenizer(self, split: str, special: Mapping[str, int], begin: Sequence[str] = ()) -> Tokenizer:
        """The tokenizer.

        Args:
            split: the pattern of the pieces that text is cut into before bytes are joined.
            special: special tokens -> ids, which follow the vocabulary without a gap.
            begin: special tokens set before every text.
        """
        letters = _letters()
        vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in self.ranks.items()}
        made = Tokenizer(BPE(vocab=vocabulary, merges=_merges(vocabulary), ignore_merges=True))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        ordered = sorted(special, key=lambda token: special[token])
        made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ordered])
        wrong = [token for token in ordered if made.token_to_id(token) != special[token]]
        if wrong:
            raise InputError(
                f"special token {wrong[0]!r} has id {special[wrong[0]]}; {made.token_to_id(wrong[0])} comes next",
                where=self.path,
            )
        if begin:
            whole = " ".join([*begin, "$A"])
            made.post_processor = processors.TemplateProcessing(
                single=whole,
                pair=f"{whole} {whole.replace('$A', '$B:1')}",
                special_tokens=[(token, special[token]) for token in begin],
            )
        return made


def _merges(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    found = []
    for token, rank in vocabulary.items():
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in vocabulary and token[cut:] in vocabulary:
                found.append((rank, -cut, token[:cut], token[cut:]))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _letters() -> list[str]:
    """The byte-level alphabet of GPT-2 (its `bytes_to_unicode`): printable bytes are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
