"""Rows of samples in, a Batch of tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from fitune.data.batch import Batch
from fitune.data.encoding import EncodedSample

ROUND_TOKENS = 64
_SIGNS = {None: 0, True: 1, False: -1}


def collate(
    rows: Sequence[Sequence[EncodedSample]], row_tokens: int, pad_id: int,
    shared: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Batch:  # fmt: skip
    """B rows of samples -> a Batch [B, T], T being the longest row's tokens rounded up, at most `row_tokens`.

    Rounding makes the batches of a run the same size or nearly, so that memory freed by one fits the next.

    Args:
        shared: for each sample of each row (group, tokens): neighbours of the same group (not -1) share so many
            first tokens, which are laid down once. None: nothing is shared.

    Raises:
        ValueError: there are no rows, a row or sample is empty, or a row is longer than `row_tokens`.
    """
    if not rows or not all(row and all(len(sample) for sample in row) for row in rows):
        raise ValueError("a batch needs at least one row, and a row at least one sample that is not empty")
    laid = [_lay_out(row, shared[number] if shared else None) for number, row in enumerate(rows)]
    longest = max(pieces[-1].stop for pieces in laid)
    if longest > row_tokens:
        raise ValueError(f"a row of {longest} tokens, but rows hold {row_tokens}")
    longest = min(row_tokens, -(-longest // ROUND_TOKENS) * ROUND_TOKENS)
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    positions = torch.zeros((len(rows), longest), dtype=torch.int64)
    weights = torch.zeros((len(rows), longest), dtype=torch.float32)
    documents: list[tuple[int, ...]] = []
    pairs: list[tuple[int, int]] = []
    labels: list[int] = []
    for number, pieces in enumerate(laid):
        for piece in pieces:
            own = slice(piece.start, piece.stop)
            part = slice(piece.skip, piece.skip + piece.stop - piece.start)
            tokens[number, own] = torch.tensor(piece.sample.tokens[part])
            positions[number, own] = torch.arange(piece.position, piece.position + part.stop - part.start)
            if piece.is_worse:
                pairs.append((len(documents) - 1, len(documents)))
            weights[number, own] = torch.tensor(piece.sample.trained[part], dtype=torch.float32)
            if piece.skip and piece.sample.trained[piece.skip]:
                raise ValueError("a sample's first token after a shared beginning is trained")
            weights[number, piece.start] = 0.0  # nothing in its document, or no single token, precedes it
            documents.append((number, piece.start, piece.stop, *piece.prefix))
            labels.append(_SIGNS[piece.sample.label])
        stop = pieces[-1].stop
        if stop < longest:
            positions[number, stop:] = torch.arange(longest - stop)
            documents.append((number, stop, longest, 0, 0))
            labels.append(0)
    return Batch(
        tokens, positions, weights, torch.tensor(documents, dtype=torch.int32),
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2), torch.tensor(labels, dtype=torch.int8),
    )  # fmt: skip


class _Piece:
    """A stretch of a row: tokens `skip`, `skip` + 1, ... of `sample` at [start, stop), continuing `prefix`.

    `position` of the first one; `is_worse`: a pair's worse answer, after its better one.
    """

    __slots__ = ("is_worse", "position", "prefix", "sample", "skip", "start", "stop")

    def __init__(
        self, sample: EncodedSample, skip: int, length: int, start: int, prefix: tuple[int, int] = (0, 0),
        position: int | None = None,
    ) -> None:  # fmt: skip
        self.sample, self.skip, self.start, self.stop, self.prefix = sample, skip, start, start + length, prefix
        self.position, self.is_worse = skip if position is None else position, position is not None


def _lay_out(row: Sequence[EncodedSample], shared: Sequence[tuple[int, int]] | None) -> list[_Piece]:
    pieces: list[_Piece] = []
    place = 0
    kinds = shared if shared is not None else [(-1, 0)] * len(row)
    for (group, common), run in groupby(zip(row, kinds, strict=True), key=lambda item: item[1]):
        members = [sample for sample, _ in run]
        prefix = (0, 0)
        if group >= 0 and len(members) > 1:
            if any(one.worse_from or one.label is not None for one in members):
                raise ValueError(
                    f"a judged answer in group {group}: pairs and judged answers share nothing with others"
                )
            beginning = members[0].tokens[:common]
            if any(len(one) <= common or one.tokens[:common] != beginning for one in members):
                raise ValueError(f"samples of group {group} do not share their first {common} tokens")
            if any(any(one.trained[:common]) for one in members):
                raise ValueError(f"a shared beginning of group {group} is trained")
            pieces.append(_Piece(members[0], 0, common, place))
            prefix = (place, place + common)
            place += common
        for sample in members:
            if sample.worse_from:
                pieces += _pair(sample, place)
                place = pieces[-1].stop
                continue
            skip = prefix[1] - prefix[0]
            pieces.append(_Piece(sample, skip, len(sample) - skip, place, prefix))
            place = pieces[-1].stop
    return pieces


def _pair(sample: EncodedSample, place: int) -> list[_Piece]:
    """What comes before both answers, once; and both answers, which do not see each other."""
    fork, worse = sample.fork, sample.worse_from
    prefix = (place, place + fork) if fork else (0, 0)
    pieces = [_Piece(sample, 0, fork, place)] if fork else []
    better = _Piece(sample, fork, worse - fork, place + fork, prefix)
    return [*pieces, better, _Piece(sample, worse, len(sample) - worse, better.stop, prefix, position=fork)]
