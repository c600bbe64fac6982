"""Samples in, a training and a validation part out: seeded, disjoint, equal samples on one side."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fitune.data.chance import shuffled
from fitune.errors import InputError

Places = NDArray[Any]


def groups_of(keys: tuple[NDArray[np.uint64], NDArray[np.uint64]]) -> tuple[Places, Places]:
    """Two keys of each sample -> its group, [samples], and the first of each group, [groups]. Equal in both: one."""
    high, low = keys
    order = np.argsort(high, kind="stable")  # of equal ones the first stays first
    is_new = np.ones(len(order), dtype=bool)
    ordered = high[order]
    is_new[1:] = ordered[1:] != ordered[:-1]
    del ordered
    alike = np.flatnonzero(~is_new)
    if (low[order[alike]] != low[order[alike - 1]]).any():  # by chance alike in one key: in practice never
        order = np.lexsort((low, high))
        is_new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    groups = np.empty(len(order), dtype=np.int32 if len(order) < 1 << 31 else np.int64)
    groups[order] = np.cumsum(is_new, dtype=groups.dtype) - 1
    return groups, order[is_new]


def of_documents(groups: Places, table: Places, numbers: NDArray[np.uint64]) -> Places:
    """The groups, but of all parts of a document the first one's: they stay together.

    Args:
        groups: as `groups_of`, [samples].
        table, numbers: of each sample its table and which sample of its file it is; parts follow each other.
    """
    begins = np.ones(len(groups), dtype=bool)
    begins[1:] = (numbers[1:] != numbers[:-1]) | (table[1:] != table[:-1])
    return groups[begins][np.cumsum(begins) - 1]


def split_share(groups: Places, share: float, seed: int) -> tuple[Places, Places]:
    """Each sample's group -> indices to train on and indices held out, each ascending; a group stays together.

    At least `share` of the samples is held out where equal samples allow it, at least one always.

    Raises:
        InputError: nothing would be left for one of the two.
    """
    _, groups = np.unique(groups, return_inverse=True)
    sizes = np.bincount(groups)
    wanted = max(1, round(share * len(groups)))
    is_held_out = np.zeros(len(sizes), dtype=bool)
    held = 0
    for group in shuffled(len(sizes), f"validation split with seed {seed}")[:-1]:  # the last one stays for training
        if held >= wanted:
            break
        if not held or held + sizes[group] <= wanted:
            is_held_out[group] = True
            held += int(sizes[group])
    if not held:
        raise InputError(
            f"validation: {len(groups)} samples, {len(sizes)} different, are too few to hold out a share of {share:g}"
        )
    return np.flatnonzero(~is_held_out[groups]), np.flatnonzero(is_held_out[groups])
