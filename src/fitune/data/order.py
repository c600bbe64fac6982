"""Which samples come when: the rows of one epoch, from the seed alone, so that a run resumes at any row."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fitune.data.encoding import EncodedSample
from fitune.data.packing import pack as packed
from fitune.data.prefixes import Prefixes

# Packing draws from so many shuffled samples at a time: enough to fill rows, few enough that epochs differ.
_PACKED_TOGETHER = 2048
# Below so many rows' worth of tokens two packings would leave too much of their last rows empty.
_ROWS_WORTH_SPLITTING = 64
# Without packing, samples of like length share a micro-batch; they are sorted within so many micro-batches.
_SORTED_TOGETHER = 32


def epoch_rows(
    samples: Sequence[EncodedSample], row_tokens: int, micro_batch: int, seed: int, epoch: int, pack: bool,
    prefixes: Prefixes | None = None,
) -> list[list[int]]:  # fmt: skip
    """Rows of sample indices for one epoch, every sample exactly once; `micro_batch` rows after another are one.

    The same arguments give the same rows, on every machine; another epoch or seed gives another order, and
    other samples together. With `prefixes`, packed samples of one group lie side by side and their prefix counts
    once.

    Raises:
        ValueError: a sample is longer than `row_tokens`.
    """
    lengths = [len(sample) for sample in samples]
    # A text seed goes through SHA-512, so neighbouring seeds and epochs have nothing in common.
    chance = random.Random(f"rows of epoch {epoch} with seed {seed}")
    order = list(range(len(samples)))
    chance.shuffle(order)
    if not pack:
        for index in order:
            packed([lengths[index]], row_tokens)  # checks that it fits
        return _by_length(order, lengths, micro_batch, chance)
    rows = []
    for window in _windows(order, sum(lengths), row_tokens):
        blocks = _blocks(window, lengths, row_tokens, prefixes or Prefixes.none(len(samples)))
        for row in packed([tokens for tokens, _ in blocks], row_tokens):
            chosen = [blocks[place][1] for place in row]
            chance.shuffle(chosen)  # or each row would begin with its longest document
            for members in chosen:
                chance.shuffle(members)
            rows.append([index for members in chosen for index in members])
    chance.shuffle(rows)
    return rows


def _blocks(
    window: list[int], lengths: list[int], row_tokens: int, prefixes: Prefixes
) -> list[tuple[int, list[int]]]:
    """(tokens, samples) of what must lie side by side: samples of one group, as many as a row holds, or one."""
    groups: dict[int, list[int]] = {}
    for index in window:
        groups.setdefault(prefixes.group[index], []).append(index)
    blocks = [(lengths[index], [index]) for index in groups.pop(-1, [])]
    for group, members in sorted(groups.items()):
        common = prefixes.tokens[group]
        own = [lengths[index] - common for index in members]
        for block in packed(own, row_tokens - common):
            blocks.append((common + sum(own[place] for place in block), [members[place] for place in block]))
    return blocks


def _windows(order: list[int], tokens: int, row_tokens: int) -> list[list[int]]:
    parts = max(1, -(-len(order) // _PACKED_TOGETHER))
    if tokens >= _ROWS_WORTH_SPLITTING * row_tokens:
        parts = max(2, parts)
    size = max(1, -(-len(order) // parts))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _by_length(order: list[int], lengths: list[int], micro_batch: int, chance: random.Random) -> list[list[int]]:
    batches: list[list[list[int]]] = []
    together = micro_batch * _SORTED_TOGETHER
    for start in range(0, len(order), together):
        window = sorted(order[start : start + together], key=lambda index: lengths[index])
        batches += [[[index] for index in window[at : at + micro_batch]] for at in range(0, len(window), micro_batch)]
    # A last, smaller micro-batch stays last, or the rows after it would be grouped differently.
    tail = batches.pop() if batches and len(batches[-1]) < micro_batch else []
    chance.shuffle(batches)
    return [row for batch in [*batches, tail] for row in batch]
