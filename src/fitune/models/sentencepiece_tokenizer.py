"""A sentencepiece model file as a `tokenizers` tokenizer that gives the very same ids.

Only byte-pair models are read. Everything that decides about ids is taken from the file: normalisation, prefix
space, scores, user-defined symbols, fallback to bytes. What could not be kept exactly is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from fitune.errors import InputError

BLANK = "\u2581"
# ModelProto.SentencePiece.Type and TrainerSpec.ModelType (sentencepiece_model.proto).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_BPE = 2


class SentencePieceVocabulary:
    """A `tokenizer.model` file.

    Attributes:
        path: the file.
        pieces: text, score and type of each piece, by id.
        has_prefix: whether a blank is set before every text.

    Raises InputError where it is no sentencepiece model, or one that cannot be kept exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = _read(path)
        self.pieces = [(piece.piece, piece.score, piece.type) for piece in self._model.pieces]
        self.has_prefix = bool(self._model.normalizer_spec.add_dummy_prefix)
        self._ids = {piece: place for place, (piece, _, _) in enumerate(self.pieces)}
        self._symbols = [piece for piece, _, type_ in self.pieces if type_ == USER_DEFINED]
        problems = self._refusals()
        if problems:
            raise InputError(problems, where=path)

    def _refusals(self) -> list[str]:
        trainer, normaliser = self._model.trainer_spec, self._model.normalizer_spec
        if trainer.model_type != _BPE:
            return [f"a {_KINDS.get(trainer.model_type, trainer.model_type)} model; byte-pair models are read"]
        problems = []
        if len(self._ids) != len(self.pieces):
            problems.append(f"{len(self.pieces) - len(self._ids)} pieces are there twice")
        if not normaliser.escape_whitespaces or trainer.treat_whitespace_as_suffix:
            problems.append("blanks are not written as U+2581 before words, the only way that is read")
        if normaliser.precompiled_charsmap:
            problems.append(f"text is normalised by a table ({normaliser.name}), which cannot be kept exactly")
        unused = [piece for piece, _, type_ in self.pieces if type_ == UNUSED]
        if unused:
            problems.append(f"{len(unused)} pieces are marked unused (first: {unused[0]!r}), which is not read")
        parts = {piece for piece, _, type_ in self.pieces if type_ in (NORMAL, USER_DEFINED)}
        lost = [piece for piece, _, type_ in self.pieces if type_ == NORMAL and not parts.issuperset(piece)]
        if lost:
            problems.append(f"{len(lost)} pieces hold a character that is no piece (first: {lost[0]!r})")
        mixed = [symbol for symbol in self._symbols if BLANK in symbol and symbol.strip(BLANK)]
        if mixed:
            problems.append(f"the user-defined symbol {mixed[0]!r} has a blank beside other characters")
        return problems

    def tokenizer(self, special: Sequence[str] = (), begin: Sequence[str] = (), end: Sequence[str] = ()) -> Tokenizer:
        """The tokenizer; ids are the file's, then those of `special` in order.

        Args:
            special: special tokens that have no piece of their own follow the vocabulary; those that have one
                are marked special, user-defined symbols too. Control pieces are special always.
            begin: tokens set before every text.
            end: tokens set after every text.

        Raises InputError where a user-defined symbol that is not special stands in a model that sets a blank before
        every text: whether one comes before the symbol depends there on what stands around it.
        """
        unknown = next((piece for piece, _, type_ in self.pieces if type_ == UNKNOWN), None)
        made = Tokenizer(
            BPE(
                vocab=self._ids,
                merges=self._merges(),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=bool(self._model.trainer_spec.byte_fallback),
            )
        )
        made.normalizer = self._normaliser()
        blanks = sorted((symbol for symbol in self._symbols if not symbol.strip(BLANK)), key=len, reverse=True)
        if blanks:
            made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(blanks)), behavior="isolated")
        undo: list[Any] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if self.has_prefix else [])])
        self._check_blanks(made, blanks)
        plain = [symbol for symbol in self._symbols if symbol.strip(BLANK) and symbol not in special]
        if self.has_prefix and plain:
            raise InputError(
                f"{len(plain)} user-defined symbols (first: {plain[0]!r}) in a model that sets a blank before every "
                "text, which is read only where they are special tokens",
                where=self.path,
            )
        made.add_tokens([AddedToken(symbol, normalized=False, special=False) for symbol in plain])
        controls = [piece for piece, _, type_ in self.pieces if type_ in (UNKNOWN, CONTROL)]
        controls += [token for token in special if token not in controls]
        made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
        if begin or end:
            whole = " ".join([*begin, "$A", *end])
            made.post_processor = processors.TemplateProcessing(
                single=whole,
                pair=f"{whole} {whole.replace('$A', '$B:1')}",
                special_tokens=[(token, made.token_to_id(token)) for token in dict.fromkeys((*begin, *end))],
            )
        return made

    def _merges(self) -> list[tuple[str, str]]:
        """Every way to make a normal piece of two, the best-scored piece first.

        sentencepiece takes the leftmost of equals; in a run of one letter that joins the longer left part.
        """
        symbols = {piece for piece, _, type_ in self.pieces if type_ in (NORMAL, USER_DEFINED)}
        found = []
        for place, (piece, score, type_) in enumerate(self.pieces):
            if type_ != NORMAL and not (type_ == USER_DEFINED and not piece.strip(BLANK)):
                continue
            for cut in range(len(piece) - 1, 0, -1):
                if piece[:cut] in symbols and piece[cut:] in symbols:
                    found.append((-score, place, -cut, piece[:cut], piece[cut:]))
        found.sort()
        return [(left, right) for *_, left, right in found]

    def _normaliser(self) -> Any:
        spec = self._model.normalizer_spec
        steps: list[Any] = []
        if spec.remove_extra_whitespaces:
            steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if spec.add_dummy_prefix:
            steps.append(normalizers.Prepend(BLANK))
        return normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])

    def _check_blanks(self, made: Tokenizer, blanks: list[str]) -> None:
        lost = [
            symbol for symbol in blanks if [token.id for token in made.model.tokenize(symbol)] != [self._ids[symbol]]
        ]
        if lost:
            raise InputError(
                f"the user-defined run of {len(lost[0])} blanks cannot be made of shorter runs", where=self.path
            )


def _read(path: Path) -> Any:
    # Inside: the package's generated module takes a while to load, and few models need it.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if not path.is_file():
        raise InputError(f"{path.name} is missing: the model's vocabulary is in it", where=path.parent)
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(f"no sentencepiece model, or a damaged one ({error})", where=path) from error
    if not model.pieces:
        raise InputError("no sentencepiece model: it holds no pieces", where=path)
    return model
