"""What rows are judged by, kept in the index: one score a row, or its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rehearsal_plugin.core.arrays import Float32Array, IntArray

__all__ = ["Scores", "SumTree", "bounded"]


LARGEST = 1e9
"""Of a value, so that sums and squares stay finite."""

TICKETS_PER_UNIT, MOST_TICKETS = 1 << 10, 1 << 20
"""A score of 1 weighs 1024 tickets. With at most 2^20 a row, 2^20 rows on each of 2^10 ranks stay within an int64."""


CHILDREN = 64


class SumTree:
    """Integer weights of slots: their sum, and the slot at any point of it.

    A tree in which every node holds the sums of its 64 children, so that 2^18 slots have two levels above them: wide,
    because a look at all children of a node is one array operation, as a look at one is.
    """

    def __init__(self, capacity: int) -> None:
        self._levels: list[IntArray] = []  # the slots first, the root last
        nodes = capacity
        while not self._levels or nodes > 1:
            nodes = -(-nodes // CHILDREN)
            self._levels.append(np.zeros(nodes * CHILDREN, dtype=np.int64))

    @property
    def total(self) -> int:
        """The sum of all weights."""
        return int(self._levels[-1].sum())

    def set(self, slots: IntArray, weights: IntArray) -> None:
        """Give `slots` `[n]` int64, all different, the `weights` `[n]` int64."""
        leaves, *above = self._levels
        more, nodes = weights - leaves[slots], slots
        leaves[slots] = weights
        for level in above:
            nodes = nodes // CHILDREN
            np.add.at(level, nodes, more)

    def find(self, points: IntArray) -> IntArray:
        """The slots `[n]` at `points` `[n]` int64 from 0 to `total - 1`, weights being laid end to end."""
        number = np.arange(len(points))
        nodes, left = np.zeros_like(number), points
        for level in reversed(self._levels):
            sums = level.reshape(-1, CHILDREN)[nodes]
            ends = sums.cumsum(axis=1)
            child = np.count_nonzero(ends <= left[:, None], axis=1)
            left = left - (ends - sums)[number, child]
            nodes = CHILDREN * nodes + child
        return nodes


class Scores:
    """Score or features of every stored row, and the mean of all features that were offered.

    Args:
        capacity: Slots.
        width: Numbers a row; 1 for a score.
        means: Whether anybody asks for `centre`.

    Attributes:
        stored: `[capacity, width]` float32.
    """

    def __init__(self, capacity: int, width: int, *, means: bool = True) -> None:
        self.stored = np.zeros((capacity, width), dtype=np.float32)
        self._means = means
        self._tickets: SumTree | None = None  # until somebody draws by score
        self._extremes: tuple[float, float] | None = None  # until somebody asks, and after one of them is gone
        self._sums = np.zeros((0, width))
        self._seen = np.zeros(0, dtype=np.int64)

    def set(self, slots: IntArray, values: Float32Array) -> None:
        """Give the rows at `slots` `[n]`, all different, the values `[n, width]`."""
        if self._extremes is not None:
            self._extremes = _extremes_after(self._extremes, self.stored[slots, 0].tolist(), values[:, 0].tolist())
        self.stored[slots] = values
        if self._tickets is not None:
            self._tickets.set(slots, _tickets_of(values))

    def extremes(self, count: int) -> tuple[float, float]:
        """The lowest and the highest score of the first `count` rows, which are all.

        A look at all of them only where a row with one of the two has been replaced since the last call.
        """
        if self._extremes is None:
            scores = self.stored[:count, 0]
            self._extremes = float(scores.min()), float(scores.max())
        return self._extremes

    def tickets(self, count: int) -> SumTree:
        """The scores of the first `count` rows, which are all, as whole numbers, for draws in proportion to them."""
        if self._tickets is None:
            self._tickets = SumTree(len(self.stored))
            self._tickets.set(np.arange(count), _tickets_of(self.stored[:count]))
        return self._tickets

    def count_offers(self, owners: IntArray, values: Float32Array) -> None:
        """Add offered rows, values `[n, width]` of owners `[n]`, to the owners' means."""
        if not self._means:
            return
        offered = np.bincount(owners, minlength=len(self._seen))
        missing = len(offered) - len(self._seen)
        if missing:
            self._sums = np.pad(self._sums, ((0, missing), (0, 0)))
            self._seen = np.pad(self._seen, (0, missing))
        np.add.at(self._sums, owners, values)
        self._seen += offered

    def state_dict(self, count: int) -> dict[str, Any]:
        """What the first `count` rows are judged by, and what the means need."""
        return {"stored": self.stored[:count], "sums": self._sums, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        stored = state["stored"]
        self.set(np.arange(len(stored)), stored)
        self._sums, self._seen = state["sums"].copy(), state["seen"].copy()

    def centre(self, owner: int, offered: Float32Array) -> NDArray[np.float64]:
        """The mean `[width]` of all values of an owner, those just `offered` `[n, width]` with them."""
        sums, seen = offered.sum(axis=0, dtype=np.float64), len(offered)
        if owner < len(self._seen):
            sums, seen = sums + self._sums[owner], seen + int(self._seen[owner])
        return np.asarray(sums / seen)


def _extremes_after(extremes: tuple[float, float], old: list[float], new: list[float]) -> tuple[float, float] | None:
    """The lowest and the highest score after some were replaced; None where that takes a look at all."""
    lowest, highest = extremes
    if lowest in old or highest in old:
        return None
    return min([lowest, *new]), max([highest, *new])


def _tickets_of(scores: Float32Array) -> IntArray:
    """Of rows with scores `[n, 1]`: `[n]`, at least one each, so that every row can be drawn."""
    shares = scores[:, 0] * np.float64(TICKETS_PER_UNIT)
    return np.minimum(np.maximum(shares, 1), MOST_TICKETS).astype(np.int64)


def bounded(values: Float32Array) -> Float32Array:
    """Values that can be compared: what is no number becomes 0, what is infinite the largest one.

    The array itself where they all can be.
    """
    if np.count_nonzero(np.abs(values) <= LARGEST) == values.size:
        return values
    return np.where(np.isnan(values), np.float32(0), values.clip(-LARGEST, LARGEST))
