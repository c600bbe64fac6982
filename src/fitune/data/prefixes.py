"""Beginnings that many samples share (a system message, a database's schema), so that a row holds them once.

Samples that begin with the same tokens may lie in a row as one prefix and several continuations, each attending to
the prefix and to itself: exactly the same numbers as whole samples side by side, for fewer tokens. A prefix ends
before anything that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fitune.data.encoding import EncodedSample

# A shorter beginning saves less than its bookkeeping and its own document cost.
LEAST_PREFIX_TOKENS = 16
# A sample joins its neighbours' group if it shares at least this part of what they share so far.
LEAST_KEPT_SHARE = 0.6


@dataclass(frozen=True)
class Prefixes:
    """Which samples share a beginning.

    Attributes:
        group: for each sample the number of its group, or -1.
        tokens: for each group how many tokens its samples share.
    """

    group: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def none(cls, samples: int) -> Prefixes:
        """Nothing is shared."""
        return cls((-1,) * samples, ())

    def own_tokens(self, sample: int, length: int) -> int:
        """How many of a sample's `length` tokens are not in its group's prefix."""
        group = self.group[sample]
        return length if group < 0 else length - self.tokens[group]

    def take(self, indices: Sequence[int]) -> Prefixes:
        """The same for some of the samples, in the order of `indices`."""
        return Prefixes(tuple(self.group[index] for index in indices), self.tokens)


def find_prefixes(samples: Sequence[EncodedSample]) -> Prefixes:
    """Groups samples by their beginnings: neighbours in sorted order, as long as they share enough."""
    order = sorted(range(len(samples)), key=lambda index: (samples[index].tokens, index))
    group = [-1] * len(samples)
    tokens: list[int] = []
    members: list[int] = []
    shared = 0

    def close() -> None:
        if len(members) > 1:
            for index in members:
                group[index] = len(tokens)
            tokens.append(shared)

    for index in order:
        limit = _untrained_beginning(samples[index])
        if members:
            common = min(_common(samples[members[-1]].tokens, samples[index].tokens), limit, shared)
            # A group's first sample shares nothing yet, so nothing is lost by what the second cuts off.
            least = LEAST_KEPT_SHARE * shared if len(members) > 1 else 0
            if common >= max(LEAST_PREFIX_TOKENS, least):
                shared = common
                members.append(index)
                continue
        close()
        members, shared = [index], limit
    close()
    return Prefixes(tuple(group), tuple(tokens))


def _untrained_beginning(sample: EncodedSample) -> int:
    """How many tokens come before the last one that precedes the first trained token: what a prefix may take.

    The token after a prefix is never trained, as the prefix's last token would have to predict it for several
    samples at once.
    """
    first = sample.trained.index(True) if True in sample.trained else len(sample)
    return max(0, first - 1)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers both begin with, by halves: comparing slices is far quicker than numbers one by one."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
