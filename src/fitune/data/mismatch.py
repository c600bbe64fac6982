"""Questions with the answers of others: what a model makes of answers in general, whatever was asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fitune.data.batch import Batch
from fitune.data.collation import collate
from fitune.data.encoding import EncodedSample
from fitune.data.packing import pack


def mismatched(batches: Sequence[Batch], packs: bool = True) -> list[Batch]:
    """Every judged answer's question with the answer of the next one, the last one's with the first's.

    Rows are no longer than the longest of `batches`, and no more to a micro-batch; an answer is cut where it does not
    fit. `packs`: whether the model keeps several answers in a row apart. Nothing of fewer than two answers.
    """
    found = [answer for batch in batches for answer in _answers(batch)]
    if len(found) < 2:
        return []
    width = max(batch.tokens.shape[1] for batch in batches)
    height = max(batch.tokens.shape[0] for batch in batches)
    samples = []
    for (question, _), (_, answer) in zip(found, [*found[1:], found[0]], strict=True):
        tokens = (*question, *answer)[:width]
        trained = [place >= len(question) for place in range(len(tokens))]
        samples.append(EncodedSample(tokens, tuple(trained), label=True))
    lengths = [len(sample) for sample in samples]
    places = pack(lengths, width) if packs else [[place] for place in range(len(samples))]
    rows = [[samples[place] for place in row] for row in places]
    return [collate(rows[at : at + height], width, 0) for at in range(0, len(rows), height)]


def _answers(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens before a judged document's first trained one, and from there to the last trained one."""
    for document, (row, start, stop, *_) in enumerate(batch.documents.tolist()):
        if batch.labels[document]:
            weights = batch.weights[row, start:stop]
            trained = weights.nonzero().squeeze(1).tolist()
            if trained:
                tokens = batch.tokens[row, start:stop].tolist()
                yield tokens[: trained[0]], tokens[trained[0] : trained[-1] + 1]
