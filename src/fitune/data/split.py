"""Samples in, a training and a validation part out: seeded, disjoint, equal samples on one side."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Hashable, Sequence

from fitune.data.encoding import EncodedSample
from fitune.errors import InputError


def content_key(sample: EncodedSample) -> bytes:
    """The same for two samples exactly if they have the same tokens and the same mask (BLAKE2b, 128 bits)."""
    digest = hashlib.blake2b(array("q", sample.tokens).tobytes(), digest_size=16)
    digest.update(bytes(sample.trained))
    return digest.digest()


def split_share(keys: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Sample keys -> indices to train on and indices held out, each ascending; equal keys stay together.

    At least `share` of the samples is held out where equal samples allow it, at least one always.

    Raises:
        InputError: nothing would be left for one of the two.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    order = list(groups.values())
    random.Random(f"validation split with seed {seed}").shuffle(order)
    wanted = max(1, round(share * len(keys)))
    held_out: list[int] = []
    for group in order[:-1]:  # the last group stays for training
        if len(held_out) >= wanted:
            break
        if not held_out or len(held_out) + len(group) <= wanted:
            held_out += group
    if not held_out:
        raise InputError(
            f"validation: {len(keys)} samples, {len(groups)} different, are too few to hold out a share of {share:g}"
        )
    chosen = set(held_out)
    return [index for index in range(len(keys)) if index not in chosen], sorted(held_out)
