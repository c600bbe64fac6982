"""A GGUF file's vocabulary as a transformers tokenizer.

Text is split before merging exactly as the vocabulary was learned: `tokenizer.ggml.pre` names the way, and a
way that is not known here is refused, because a wrong one gives wrong tokens only now and then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fitune.errors import InputError
from fitune.models.gguf_header import GGUFHeader

# ggml's token types (llama.h, llama_token_attr).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_SPLIT = "gpt-2"
_DIGITS_THEN_GPT2 = "digits"

# tokenizer.ggml.pre -> how text is split (a pattern, or one of the two words above).
PRE_TOKENIZERS = {
    "gpt-2": _GPT2_SPLIT,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "codeshell": _DIGITS_THEN_GPT2,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "tekken": _TEKKEN,
}
# Phi-3's special tokens swallow the blanks that follow them, except these (llama.cpp's vocabulary loader).
_PHI3_PLAIN = {"<unk>", "<s>", "<|endoftext|>"}
# A piece that is itself a token is taken whole, whatever the merges say.
_WHOLE_PIECES_FIRST = {_LLAMA3, _TEKKEN}
_ADDS_BOS_UNLESS_TOLD = {_LLAMA3, _TEKKEN}


def build_tokenizer(header: GGUFHeader) -> PreTrainedTokenizerFast:
    """Header -> tokenizer with special tokens and chat template. Raises InputError for what is not known."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise InputError("the file holds no vocabulary (tokenizer.ggml.tokens)", where=header.path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(
            f"the vocabulary names {len(tokens) - len(vocabulary)} tokens twice, which no tokenizer can hold",
            where=header.path,
        )
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(header, vocabulary)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(header, vocabulary), True
    else:
        raise InputError(
            f"tokenizer kind {kind!r}; gpt2 (byte-level BPE) and llama (sentencepiece) are read from GGUF",
            where=header.path,
        )
    _mark_special(tokenizer, header, tokens)
    _add_ends(tokenizer, header, tokens, adds_bos)
    named = {
        f"{role}_token": tokens[found]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (found := token_id(header, key)) is not None
    }
    context = header.metadata.get(f"{header.architecture}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=header.metadata.get("tokenizer.chat_template"),
        **({"model_max_length": int(context)} if context else {}),
        **named,
    )


def token_id(header: GGUFHeader, role: str) -> int | None:
    """The id of a role such as `bos`, `eos`, `eot`, `unknown`, `padding`; None where the file names none."""
    found = header.metadata.get(f"tokenizer.ggml.{role}_token_id")
    tokens = header.metadata.get("tokenizer.ggml.tokens") or []
    return int(found) if found is not None and 0 <= int(found) < len(tokens) else None


def _byte_level(header: GGUFHeader, vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    pre = header.metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"tokenizer.ggml.pre is {pre!r}: how it splits text is not known here; "
            f"known: {', '.join(sorted(PRE_TOKENIZERS))}",
            where=header.path,
        )
    split = PRE_TOKENIZERS[pre]
    pairs: list[tuple[str, str]] = []
    for merge in header.metadata.get("tokenizer.ggml.merges") or []:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    model = BPE(vocab=vocabulary, merges=pairs, fuse_unk=False, ignore_merges=split in _WHOLE_PIECES_FIRST)
    tokenizer = Tokenizer(model)
    if split == _GPT2_SPLIT:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif split == _DIGITS_THEN_GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split in _ADDS_BOS_UNLESS_TOLD


def _sentencepiece(header: GGUFHeader, vocabulary: dict[str, int]) -> Tokenizer:
    """Sentencepiece's BPE: the best-scored piece that two neighbours make is merged first."""
    scores = header.metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocabulary):
        raise InputError("tokenizer.ggml.scores is missing or has another length", where=header.path)
    unknown = token_id(header, "unknown")
    tokens = header.metadata["tokenizer.ggml.tokens"]
    model = BPE(
        vocab=vocabulary,
        merges=_merges_from_scores(vocabulary, scores),
        unk_token=tokens[unknown] if unknown is not None else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    has_prefix = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
    blank = "\u2581"
    steps: list[Any] = [normalizers.Prepend(blank)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", blank)])
    undo: list[Any] = [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])
    return tokenizer


def _merges_from_scores(vocabulary: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    found = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-float(scores[index]), vocabulary[left], vocabulary[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _mark_special(tokenizer: Tokenizer, header: GGUFHeader, tokens: list[str]) -> None:
    """Control and user-defined tokens are matched whole, before anything is split."""
    types = header.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return
    marked = np.asarray(types)
    for type_ in (_CONTROL, _UNKNOWN, _USER_DEFINED):
        chosen = []
        for index in np.flatnonzero(marked == type_):
            token = tokens[index]
            swallows = header.architecture == "phi3" and token not in _PHI3_PLAIN
            chosen.append(AddedToken(token, normalized=False, special=type_ != _USER_DEFINED, rstrip=swallows))
        (tokenizer.add_tokens if type_ == _USER_DEFINED else tokenizer.add_special_tokens)(chosen)


def _add_ends(tokenizer: Tokenizer, header: GGUFHeader, tokens: list[str], adds_bos: bool) -> None:
    """Beginning and end tokens that belong to every text, as the file says."""
    ends = {}
    for role, is_added in (("bos", adds_bos), ("eos", False)):
        found = token_id(header, role)
        if found is not None and bool(header.metadata.get(f"tokenizer.ggml.add_{role}_token", is_added)):
            ends[role] = (tokens[found], found)
    if not ends:
        return
    single = " ".join(
        [*([ends["bos"][0]] if "bos" in ends else []), "$A", *([ends["eos"][0]] if "eos" in ends else [])]
    )
    pair = single + " " + single.replace("$A", "$B")
    # Token type 1 marks the second text.
    pair = " ".join(part if i < len(single.split(" ")) else part + ":1" for i, part in enumerate(pair.split(" ")))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(ends.values())
    )
