"""Which samples come when: the rows of an epoch one by one, from the seed alone, so that a run resumes at any.

Samples are shuffled as a whole, and laid into rows window by window: only one window's tokens are in memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fitune.data.ahead import Ahead
from fitune.data.chance import shuffled
from fitune.data.encoding import EncodedSample
from fitune.data.packing import pack as packed
from fitune.data.prefixes import Prefixes, find_prefixes
from fitune.data.token_table import Places, Samples, lengths_of

# Another way to order rows gets another number: a run cannot go on in the middle of it.
ORDER_VERSION = 2
# Packing draws from so many shuffled samples at a time: enough to fill rows, few enough that epochs differ.
_PACKED_TOGETHER = 2048
# Below so many rows' worth of tokens two packings would leave too much of their last rows empty.
_ROWS_WORTH_SPLITTING = 64
# Without packing, samples of like length share a micro-batch; they are sorted within so many micro-batches.
_SORTED_TOGETHER = 32


class Row(NamedTuple):
    """One row of an epoch.

    Attributes:
        samples: their numbers, in the order in which they lie in it.
        shared: for each of them the group of neighbours that it shares its beginning with, and that beginning's
            tokens; (-1, 0): none.
    """

    samples: tuple[int, ...]
    shared: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, *samples: int) -> Row:
        """Samples that share nothing."""
        return cls(samples, ((-1, 0),) * len(samples))


def epoch_rows(
    samples: Sequence[EncodedSample], row_tokens: int, micro_batch: int, seed: int, epoch: int, pack: bool,
    share: bool = True,
) -> Iterator[Row]:  # fmt: skip
    """The rows of one epoch, every sample exactly once; `micro_batch` rows after another are one.

    The same arguments give the same rows, on every machine; another epoch or seed gives another order, and
    other samples together. With `share`, packed samples that begin alike lie side by side and their beginning counts
    once.

    Raises:
        ValueError: a sample is longer than `row_tokens`.
    """
    lengths = lengths_of(samples)
    longest = int(lengths.max(initial=0))
    if longest > row_tokens:
        raise ValueError(f"document {int(lengths.argmax())} has {longest} tokens; a row holds 1 to {row_tokens}")
    words = f"rows of epoch {epoch} with seed {seed}"
    order = shuffled(len(samples), words)
    if pack:
        size = _window_size(len(order), int(lengths.sum(dtype=np.int64)), row_tokens)
    else:
        size = micro_batch * _SORTED_TOGETHER
    ahead = Ahead(samples, order) if pack and isinstance(samples, Samples) and samples.are_on_disk else None
    for number, start in enumerate(range(0, len(order), size)):
        window = order[start : start + size]
        chance = random.Random(f"window {number} of {words}")
        if pack:
            found = (
                ahead.taken(start, start + len(window)) if ahead else [samples[place] for place in window.tolist()]
            )
            yield from _packed_rows(window.tolist(), found, row_tokens, chance, share)
        else:
            yield from _rows_by_length(window[np.argsort(lengths[window], kind="stable")], micro_batch, chance)


def _packed_rows(
    numbers: list[int], found: Sequence[EncodedSample], row_tokens: int, chance: random.Random, share: bool
) -> list[Row]:
    prefixes = find_prefixes(found) if share else Prefixes.none(len(found))
    blocks = _blocks([len(sample) for sample in found], row_tokens, prefixes)
    rows = []
    for row in packed([tokens for tokens, _ in blocks], row_tokens):
        chosen = [blocks[place][1] for place in row]
        chance.shuffle(chosen)  # or each row would begin with its longest document
        for members in chosen:
            chance.shuffle(members)
        places = [place for members in chosen for place in members]
        groups = [prefixes.group[place] for place in places]
        shared = tuple((group, prefixes.tokens[group] if group >= 0 else 0) for group in groups)
        rows.append(Row(tuple(numbers[place] for place in places), shared))
    chance.shuffle(rows)
    return rows


def _blocks(lengths: list[int], row_tokens: int, prefixes: Prefixes) -> list[tuple[int, list[int]]]:
    """(tokens, samples) of what must lie side by side: samples of one group, as many as a row holds, or one."""
    groups: dict[int, list[int]] = {}
    for place in range(len(lengths)):
        groups.setdefault(prefixes.group[place], []).append(place)
    blocks = [(lengths[place], [place]) for place in groups.pop(-1, [])]
    for group, members in sorted(groups.items()):
        common = prefixes.tokens[group]
        own = [lengths[place] - common for place in members]
        for block in packed(own, row_tokens - common):
            blocks.append((common + sum(own[place] for place in block), [members[place] for place in block]))
    return blocks


def _window_size(samples: int, tokens: int, row_tokens: int) -> int:
    parts = max(1, -(-samples // _PACKED_TOGETHER))
    if tokens >= _ROWS_WORTH_SPLITTING * row_tokens:
        parts = max(2, parts)
    return max(1, -(-samples // parts))


def _rows_by_length(window: Places, micro_batch: int, chance: random.Random) -> list[Row]:
    numbers = window.tolist()
    batches = [
        [Row.of(number) for number in numbers[at : at + micro_batch]] for at in range(0, len(numbers), micro_batch)
    ]
    # A last, smaller micro-batch stays last, or the rows after it would be grouped differently.
    tail = batches.pop() if batches and len(batches[-1]) < micro_batch else []
    chance.shuffle(batches)
    return [row for batch in [*batches, tail] for row in batch]
