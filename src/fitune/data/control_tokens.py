"""Text in, tokens out, with control tokens written by the template kept apart from look-alikes in the data.

A tokenizer reads "<|im_end|>" as its control token wherever it stands, also inside a user's question. Here the
data's own are read as plain text. How: in a copy of the tokenizer each control token has an alias, which only
the template's text can hold; the aliases are found, control tokens are not. So everything else (normaliser,
prefix spaces, whitespace that a control token swallows) works as in the original.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fitune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Code points that Unicode reserves for a program's inner use; text is not meant to hold them.
_OPEN, _CLOSE, _ANCHOR = "\ufdd0", "\ufdd1", "\ufdd2"
# Private-use characters, one of which is set inside a look-alike so that the template's render cannot hold it.
_BREAKERS = [chr(code) for code in range(0xF8F0, 0xF900)] + [chr(code) for code in range(0x10FF00, 0x10FFFE)]


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Tokens of a text.

    Attributes:
        tokens: their ids.
        offsets: the characters [start, end) of the text that each token stands for.
        borders: for every cut, how many tokens come before it.
        unknown: how many tokens stand for text that the vocabulary does not have.
    """

    tokens: list[int]
    offsets: list[tuple[int, int]]
    borders: list[int]
    unknown: int


class ControlTokens:
    """The control tokens of one tokenizer: finds them in text, and encodes text that holds them.

    Attributes:
        names: the control tokens' texts -> ids.

    Raises:
        InputError: the tokenizer has no fast implementation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, also: Collection[str] = ()) -> None:
        """`also`: added tokens that the template uses as control tokens though they are not marked special."""
        from tokenizers import AddedToken, Tokenizer

        if not tokenizer.is_fast:
            raise InputError(
                f"the tokenizer {type(tokenizer).__name__} has no fast implementation (tokenizer.json), "
                "which exact masks need; convert it with transformers"
            )
        added = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
        special = {token for token, (_, flags) in added.items() if flags.special} | set(also)
        special |= {token for token in tokenizer.all_special_tokens if token in added}
        # A token of one character could not be told from text; none is known.
        self.names = {token: added[token][0] for token in sorted(special) if len(token) > 1}
        self._matcher = _any_of(self.names)
        self._starts = re.compile(f"(?=(?:{self._matcher.pattern}))") if self.names else None
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        for entry in definition["added_tokens"]:
            # Only tokens marked special are passed over by encode_special_tokens.
            entry["special"] = entry["special"] or entry["content"] in self.names
        model = definition["model"]
        vocabulary = model["vocab"] if isinstance(model.get("vocab"), dict) else {}
        self._unknown: int | None = vocabulary.get(model.get("unk_token"))
        is_byte_level = '"ByteLevel"' in json.dumps(definition["pre_tokenizer"])
        self._missing_bytes = _missing_bytes(vocabulary) if is_byte_level and vocabulary else frozenset()
        definition["truncation"] = definition["padding"] = None
        self._copy = Tokenizer.from_str(json.dumps(definition))
        self._copy.encode_special_tokens = True
        self._alias = {token: f"{_OPEN}{index}{_CLOSE}" for token, index in self.names.items()}
        self._copy.add_tokens(
            [
                AddedToken(
                    self._alias[token],
                    special=False,
                    normalized=False,
                    lstrip=added[token][1].lstrip,
                    rstrip=added[token][1].rstrip,
                    single_word=added[token][1].single_word,
                )
                for token in self.names
            ]
            + [AddedToken(_ANCHOR, special=False, normalized=False)]
        )
        self._genuine = {self._copy.token_to_id(self._alias[token]): self.names[token] for token in self.names}
        self._ids = frozenset(self.names.values())
        # Some older tokenizers put a prefix space after every added token; then the anchor is not neutral.
        first = self._copy.encode(_ANCHOR + "a", add_special_tokens=False).tokens[1]
        self._anchor_is_neutral = not first.startswith(("▁", "Ġ"))

    def count(self, text: str) -> int:
        """How many control tokens stand in the text, as the tokenizer would find them."""
        return sum(1 for _ in self._matcher.finditer(text))

    def lost_characters(self, text: str) -> int:
        """How many characters have a byte that a byte-level vocabulary lacks; the tokenizer leaves it out."""
        if not self._missing_bytes or self._missing_bytes.isdisjoint(text.encode()):
            return 0
        return sum(1 for letter in text if not self._missing_bytes.isdisjoint(letter.encode()))

    def breaker_for(self, texts: Collection[str]) -> str:
        """A character that none of the texts holds."""
        for letter in _BREAKERS:
            if not any(letter in text for text in texts):
                return letter
        raise InputError("the text holds every private-use character that could mark control tokens")

    def broken(self, text: str, breaker: str) -> str:
        """The text with `breaker` inside every control token's look-alike, so that none is left whole."""
        self._check_plain(text)
        if self._starts is None or not self.count(text):
            return text
        starts = [match.start() for match in self._starts.finditer(text)]
        pieces = [text[begin + 1 : end + 1] for begin, end in zip([-1, *starts], [*starts, len(text)], strict=True)]
        return breaker.join(pieces)

    def spans(self, render: str) -> list[tuple[int, int]]:
        """Where control tokens stand whole in a render, start and end in characters."""
        return [match.span() for match in self._matcher.finditer(render)]

    def encode(self, render: str, cuts: Sequence[int] = (), breaker: str = "") -> EncodedText:
        """The render's tokens, where each stands in it, and how many come before each cut.

        Whole control tokens become control tokens, broken ones plain text without the breaker. The render
        is encoded in pieces that end at `cuts` (ascending characters), each as if the text before it were
        all there is: so the tokens before a cut are those of the text before the cut, always.

        Raises:
            InputError: the tokenizer cannot do that for this text.
        """
        text, places = self._aliased(render, breaker)
        inner = [bisect_left(places, cut) for cut in cuts]
        borders: list[int] = []
        tokens: list[int] = []
        offsets: list[tuple[int, int]] = []
        if self._anchor_is_neutral:
            for begin, end in zip([0, *inner], [*inner, len(text)], strict=True):
                piece = (_ANCHOR if begin else "") + text[begin:end]
                found = self._copy.encode(piece, add_special_tokens=False)
                skip, shift = (1, begin - 1) if begin else (0, 0)
                tokens += found.ids[skip:]
                offsets += [(start + shift, stop + shift) for start, stop in found.offsets[skip:]]
                borders.append(len(tokens))
        else:
            for end in [*inner, len(text)]:
                found = self._copy.encode(text[:end], add_special_tokens=False)
                if found.ids[: len(tokens)] != tokens:
                    raise InputError(
                        "this tokenizer joins the generation prompt's end with the answer's beginning; "
                        "the chat template must end its prompt with a control token or a line end"
                    )
                tokens, offsets = list(found.ids), list(found.offsets)
                borders.append(len(tokens))
        if self._ids & set(tokens):
            names = [token for token, index in self.names.items() if index in set(tokens)]
            raise InputError(f"the data holds {names[0]!r}, which this tokenizer cannot write as plain text")
        unknown = tokens.count(self._unknown) if self._unknown is not None else 0
        tokens = [self._genuine.get(token, token) for token in tokens]
        return EncodedText(tokens, [(places[start], places[stop]) for start, stop in offsets], borders[:-1], unknown)

    def encode_plain(self, text: str) -> EncodedText:
        """The tokens of a text in which nothing is a control token."""
        self._check_plain(text)
        found = self._copy.encode(text, add_special_tokens=False)
        if self._ids & set(found.ids):
            raise InputError("the text holds a control token that this tokenizer cannot write as plain text")
        unknown = found.ids.count(self._unknown) if self._unknown is not None else 0
        return EncodedText(list(found.ids), list(found.offsets), [], unknown)

    def _check_plain(self, text: str) -> None:
        if any(letter in text for letter in (_OPEN, _CLOSE, _ANCHOR)):
            raise InputError("the text holds U+FDD0, U+FDD1 or U+FDD2, which are no characters; remove them")

    def _aliased(self, render: str, breaker: str) -> tuple[str, list[int]]:
        """The render with aliases and without breakers, and for each place in it the place in the render."""
        pieces: list[str] = []
        places: list[int] = []
        position = 0
        for start, end in [*self.spans(render), (len(render), len(render))]:
            kept = range(position, start)
            if breaker and breaker in render[position:start]:
                kept_places = [place for place in kept if render[place] != breaker]
                places += kept_places
                pieces += [render[place] for place in kept_places]
            else:
                places += kept
                pieces.append(render[position:start])
            if end > start:
                alias = self._alias[render[start:end]]
                pieces.append(alias)
                # Inside an alias there is no place of its own; its end is the next entry.
                places.extend([start] * len(alias))
            position = end
        places.append(len(render))
        return "".join(pieces), places


def _missing_bytes(vocabulary: Collection[str]) -> frozenset[int]:
    """The bytes that no entry stands for, in the byte-level alphabet of GPT-2 (its `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    # 0xC0, 0xC1 and 0xF5 to 0xFF never occur in UTF-8.
    return frozenset(byte for byte, letter in letters.items() if letter not in vocabulary)


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
