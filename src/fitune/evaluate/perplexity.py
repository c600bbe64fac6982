"""Perplexity of a model on packed rows, summed so that neither length nor batch size changes it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fitune.data.batch import Batch
from fitune.errors import FituneError
from fitune.evaluate.intervals import Interval, Rows, bootstrap_interval
from fitune.generate.forward_call import device_of, forward_parameters, new_cache, undisturbed

LOGIT_TOKENS = 512  # tokens whose logits exist at a time: 512 x 50,000 float32 are 100 MB
Document = tuple[Tensor, Tensor]  # tokens [T] int64, and which of them count [T] bool


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What `perplexity` found.

    Attributes:
        perplexity: exp(negative log-likelihood / tokens), with a bootstrap interval over documents.
        negative_log_likelihood_nats: summed over all counted tokens.
        tokens: how many counted: those with a weight above 0.
        documents: how many documents have such tokens.
    """

    perplexity: Interval
    negative_log_likelihood_nats: float
    tokens: int
    documents: int

    @property
    def nats_per_token(self) -> float:
        """The mean negative log-likelihood: the validation loss."""
        return self.negative_log_likelihood_nats / self.tokens


def perplexity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """A causal LM and batches -> its perplexity on the tokens whose weight is above 0.

    Any transformers causal LM, called without labels: documents are taken out of their packed rows and padded
    on the right, so none sees another whatever the model does with packing, and at most LOGIT_TOKENS tokens
    have logits at a time, however long the document. Every counted token counts once, whatever its weight;
    sums are float64. The model is left as found.

    Args:
        on_progress: called with the tokens counted so far after each batch.

    Raises:
        FituneError: no token counts, or the model's log-probabilities are not finite.
    """
    found: list[tuple[float, int]] = []
    with undisturbed(model):
        for batch in batches:
            for group in _groups(_documents(batch)):
                for log_probabilities, (_, counted) in zip(_log_probabilities(model, group), group, strict=True):
                    chosen = log_probabilities[counted[1:].to(log_probabilities.device)]
                    found.append((-float(chosen.sum(dtype=torch.float64)), len(chosen)))
            if on_progress is not None:
                on_progress(sum(count for _, count in found))
    if not found:
        raise FituneError("perplexity: no token in the data counts (all weights are 0)")
    rows = np.array(found, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise FituneError("perplexity: the model's log-probabilities are not finite (NaN or infinite)")
    interval = bootstrap_interval(rows, _perplexity_of, seed=seed)
    return Perplexity(interval, math.fsum(rows[:, 0]), int(rows[:, 1].sum()), len(rows))


def _documents(batch: Batch) -> list[Document]:
    """The documents with tokens that count, each cut after the last of these: what follows plays no part."""
    tokens, counts = batch.tokens.flatten(), batch.weights.flatten() > 0
    bounds = batch.bounds.tolist()
    documents = []
    for start, end in itertools.pairwise(bounds):
        counted = counts[start:end].nonzero()
        if len(counted) == 0:
            continue
        if int(counted[0]) == 0:
            raise FituneError("perplexity: a document's first token has a weight, but nothing precedes it")
        end = start + int(counted[-1]) + 1
        documents.append((tokens[start:end], counts[start:end]))
    return documents


def _groups(documents: list[Document]) -> Iterator[list[Document]]:
    """Documents of similar length together, as long as their padded tokens stay within LOGIT_TOKENS."""
    group: list[Document] = []
    for document in sorted(documents, key=lambda document: len(document[0]), reverse=True):
        if group and (len(group) + 1) * len(group[0][0]) > LOGIT_TOKENS:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _log_probabilities(model: nn.Module, group: list[Document]) -> list[Tensor]:
    """Documents -> each one's log-probabilities of the tokens after its first, [T - 1] float32."""
    device = device_of(model)
    lengths = [len(tokens) for tokens, _ in group]
    # Padding stands on the right, where a causal model cannot see it; any token will do.
    rows = torch.zeros(len(group), max(lengths), dtype=torch.long)
    for place, (tokens, _) in enumerate(group):
        rows[place, : lengths[place]] = tokens
    rows = rows.to(device)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    if inputs.numel() <= LOGIT_TOKENS or "past_key_values" not in forward_parameters(model):
        found = _of_targets(model(input_ids=inputs, use_cache=False).logits, targets)
    else:
        # Piece by piece through the cache: the same computation, and only a piece's logits exist.
        cache = new_cache(model)
        pieces = []
        for start in range(0, inputs.shape[1], LOGIT_TOKENS):
            piece = slice(start, start + LOGIT_TOKENS)
            logits = model(input_ids=inputs[:, piece], past_key_values=cache, use_cache=True).logits
            pieces.append(_of_targets(logits, targets[:, piece]))
        found = torch.cat(pieces, dim=1)
    return [row[: length - 1] for row, length in zip(found, lengths, strict=True)]


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [B, T, V], targets [B, T] -> log-probabilities of the targets [B, T] float32."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def _perplexity_of(sums: Rows) -> float:
    return math.exp(min(700.0, sums[0] / sums[1]))
