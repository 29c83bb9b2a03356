"""Random numbers by address: no state to keep in step between ranks, threads or restarts.

A Philox counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) begins
anew for every (seed, purpose, rank, step). The same address always gives the same numbers, so a draw needs no
message and a resumed run repeats none.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import IntArray

__all__ = ["Purpose", "RandomStream", "choose_from", "generator", "integers_below"]


class Purpose(IntEnum):
    """What the numbers are for; different purposes never share numbers."""

    CANDIDATES = 1
    ADMISSION = 2
    DRAW = 3
    ORDER = 4
    RESHARD = 5
    CONTENT = 6
    SEEDING = 7
    QUERIES = 8
    THINNING = 9
    PICK = 10


class RandomStream:
    """The numbers of all steps for one purpose, from a generator that is made once and moved from step to step.

    Args:
        seed: Keys the numbers.
        purpose: Keys them too.
    """

    def __init__(self, seed: int, purpose: Purpose) -> None:
        self._bits = np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, 0])
        self._generator = np.random.Generator(self._bits)
        self._counter = [0, 0, 0, 0]
        begin: Any = self._bits.state  # lists instead of its arrays, as numpy goes through them item by item
        begin["state"] = {"counter": self._counter, "key": begin["state"]["key"].tolist()}
        begin["buffer"] = begin["buffer"].tolist()
        self._begin = begin

    def at(self, step: int, rank: int = 0) -> np.random.Generator:
        """The generator at the begin of the numbers of a step and rank, until the next call.

        Leave `rank` at 0 for what all ranks must agree on.
        """
        self._counter[2], self._counter[3] = rank, step
        self._bits.state = self._begin
        return self._generator


def integers_below(high: int | IntArray, size: int, rng: np.random.Generator) -> IntArray:
    """Uniform integers `[size]` int64 from 0 to `high - 1`, for one bound or for each its own, below 2^53.

    `Generator.integers` takes more than twice as long for a few. What is rounded here makes a number likelier than
    another by `high / 2^53` at most.
    """
    return (rng.random(size) * high).astype(np.int64)


def choose_from(size: int, wanted: int, rng: np.random.Generator) -> IntArray:
    """A uniform sample `[wanted]` int64 without replacement from the range 0 to `size - 1`, `wanted <= size`.

    Rejection sampling where few are wanted, as a permutation touches the whole range: numbers that were drawn before
    are drawn anew, until all are different.
    """
    if 2 * wanted > size:
        return rng.permutation(size)[:wanted]
    item = integers_below(size, wanted, rng)
    while len(set(item.tolist())) < wanted:
        repeats = np.delete(np.arange(wanted), np.unique(item, return_index=True)[1])
        item[repeats] = integers_below(size, len(repeats), rng)
    return item


def generator(seed: int, purpose: Purpose, step: int, rank: int = 0) -> np.random.Generator:
    """A generator of its own, as `RandomStream.at` gives it."""
    return RandomStream(seed, purpose).at(step, rank)
