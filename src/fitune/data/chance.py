"""What is drawn by a seed, the same on every machine and by every version of numpy."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def shuffled(count: int, words: str) -> NDArray[np.int64]:
    """The numbers below `count` in an order that the words alone decide; [count].

    Sorted by numbers of PCG64, whose stream numpy keeps (NEP 19), from the words' SHA-512: similar words have nothing
    in common.
    """
    seed = int.from_bytes(hashlib.sha512(words.encode()).digest(), "big")
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
