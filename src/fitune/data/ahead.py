"""The tokens of an epoch's next samples, brought into memory in one pass over their files.

An epoch asks for samples in random order. One by one each is a read of its own, and many disks give some hundreds
of these a second, but a gigabyte in order. So the tokens of some ten thousand samples that come next are read in the
order in which they lie, everything between them included where it is little, and are given out in the epoch's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fitune.data.encoding import EncodedSample
from fitune.data.token_table import Places, Samples, TokenTable, tokens_and_mask

# So many bytes of tokens are held: 80,000 samples of 200 tokens.
HELD_BYTES = 64 << 20
# What lies between two samples is read along with them up to here: about as long as a disk takes to go elsewhere.
GAP_BYTES = 256 << 10
# A read is no larger than this, or than one sample.
READ_BYTES = 16 << 20
_WORD = 4


class Ahead:
    """Samples of one epoch, asked for in its order.

    Args:
        samples: all of them; order: their numbers, as the epoch has them.
    """

    def __init__(self, samples: Samples, order: Places) -> None:
        self._samples, self._order = samples, order
        self._first = self._last = 0
        self._words = np.zeros(0, dtype=np.uint32)
        self._starts = np.zeros(1, dtype=np.int64)

    def taken(self, start: int, stop: int) -> list[EncodedSample]:
        """The samples at `start` to `stop` of the order: tokens and mask, and nothing else of them."""
        if not self._first <= start <= stop <= self._last:
            self._bring(start, stop)
        found = []
        for place in range(start - self._first, stop - self._first):
            words = self._words[self._starts[place] : self._starts[place + 1]]
            found.append(EncodedSample(*tokens_and_mask(words)))
        return found

    def _bring(self, start: int, stop: int) -> None:
        """From `start` at least to `stop`, and as many after it as are to be held."""
        self._words = self._words[:0]  # before the next ones come
        lengths = self._samples.lengths[self._order[start:]].astype(np.int64)
        ends = np.cumsum(lengths)
        count = max(stop - start, int(np.searchsorted(ends, HELD_BYTES // _WORD, side="right")))
        self._first, self._last = start, start + min(count, len(lengths))
        self._starts = np.concatenate([[0], ends[: self._last - start]])
        words = np.empty(int(self._starts[-1]), dtype=np.uint32)
        numbers = self._order[self._first : self._last]
        for table, places, found in self._samples.by_table(numbers):
            _read_into(words, self._starts[found], table, places)
        self._words = words


def _read_into(words: NDArray[np.uint32], targets: NDArray[np.int64], table: TokenTable, places: Places) -> None:
    """Puts the tokens of the samples at ascending `places` of a table to `targets` in `words`."""
    starts, lengths = table.start[places], table.length[places].astype(np.int64)
    ends = starts + lengths
    first = 0
    while first < len(places):
        # As many neighbours as one read takes: those whose gap to the one before is small.
        last = int(np.searchsorted(ends, starts[first] + READ_BYTES // _WORD, side="right"))
        gaps = np.flatnonzero(starts[first + 1 : last] - ends[first : max(first, last - 1)] > GAP_BYTES // _WORD)
        last = max(first + 1, first + 1 + int(gaps[0]) if len(gaps) else last)
        read = table.words(int(starts[first]), int(ends[last - 1] - starts[first]))
        for place in range(first, last):
            begin = int(starts[place] - starts[first])
            count = int(lengths[place])
            words[targets[place] : targets[place] + count] = read[begin : begin + count]
        first = last
