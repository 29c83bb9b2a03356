"""The scores of stored rows, and draws of rows in proportion to them.

A score is one number a row, or a vector of features for the policies that choose exemplars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import Float32Array, Float64Array, IntArray

__all__ = ["Scores", "SumTree", "bounded_scores"]

LARGEST = 1e9
"""Largest score, so that sums and squares stay finite."""

TICKETS_PER_UNIT, MOST_TICKETS = 1 << 10, 1 << 20
"""A score of 1 weighs 1024 tickets. With at most 2^20 a row, 2^20 rows on each of 2^10 ranks stay within an int64."""

CHILDREN = 64
"""Children of a node of the sum tree."""


class SumTree:
    """Integer weights of slots: their sum, and the slot at any point of it.

    A sum tree with wide nodes: every node holds the sum of its 64 children, so that 2^18 slots have
    two levels above them. Wide, because a look at 64 numbers is one array operation, as a look at one is.

    With the weights 2, 0, 3 of three slots, the points 0 to 4 lie like this:

        point   0 1 2 3 4
        slot    0 0 2 2 2        a uniform point is a draw in proportion to the weights

    Invariant: each node is the sum of its children; the root, of all weights.

    >>> tree = SumTree(3)
    >>> tree.set(np.array([0, 1, 2]), np.array([2, 0, 3]))
    >>> tree.total, tree.find(np.arange(5)).tolist()
    (5, [0, 0, 2, 2, 2])
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
    """The score of every stored row, and the mean of all scores that each partition offered.

    Args:
        capacity: Slots.
        width: Numbers in a score; more than 1 for features.
        means: Whether anybody asks for `centre`.

    Attributes:
        stored: `[capacity, width]` float32.
    """

    def __init__(self, capacity: int, width: int, *, means: bool = True) -> None:
        self.stored = np.zeros((capacity, width), dtype=np.float32)
        self._means = means
        self._tickets: SumTree | None = None  # until somebody draws by score
        self._extremes: tuple[float, float] | None = None  # until somebody asks, and after one of them is gone
        self._postponed: list[tuple[IntArray, Float32Array]] = []
        self._sums = np.zeros((0, width))  # of all offered scores, by partition
        self._offered = np.zeros(0, dtype=np.int64)

    def set(self, slots: IntArray, scores: Float32Array) -> None:
        """Give the rows at `slots` `[n]`, all different, the `scores` `[n, width]`."""
        if self._extremes is not None:
            self._extremes = _extremes_after(self._extremes, self.stored[slots, 0].tolist(), scores[:, 0].tolist())
        self.stored[slots] = scores
        if self._tickets is not None:
            self._tickets.set(slots, _tickets_of(scores))

    def postpone(self, slots: IntArray, scores: Float32Array) -> None:
        """`set` them at the next `settle`, as other ranks draw by the scores that they were told."""
        self._postponed.append((slots, scores))

    def settle(self) -> None:
        """Let postponed scores count."""
        for slots, scores in self._postponed:
            self.set(slots, scores)
        self._postponed.clear()

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

    def count_offers(self, owners: IntArray, scores: Float32Array) -> None:
        """Add the `scores` `[n, width]` of offered rows to the means of their `owners` `[n]`."""
        if not self._means:
            return
        offered = np.bincount(owners, minlength=len(self._offered))
        missing = len(offered) - len(self._offered)
        if missing:
            self._sums = np.pad(self._sums, ((0, missing), (0, 0)))
            self._offered = np.pad(self._offered, (0, missing))
        np.add.at(self._sums, owners, scores)
        self._offered += offered

    def state_dict(self, count: int) -> dict[str, Any]:
        """The scores of the first `count` rows, and what the means need."""
        return {"stored": self.stored[:count], "sums": self._sums, "seen": self._offered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        stored = state["stored"]
        self.set(np.arange(len(stored)), stored)
        self._sums, self._offered = state["sums"].copy(), state["seen"].copy()

    def centre(self, owner: int, scores: Float32Array) -> Float64Array:
        """The mean `[width]` of everything an owner has offered, the new `scores` `[n, width]` included."""
        total, offered = scores.sum(axis=0, dtype=np.float64), len(scores)
        if owner < len(self._offered):
            total, offered = total + self._sums[owner], offered + int(self._offered[owner])
        return np.asarray(total / offered)


def _extremes_after(extremes: tuple[float, float], old: list[float], new: list[float]) -> tuple[float, float] | None:
    """The lowest and the highest score after some were replaced; None where that takes a look at all."""
    lowest, highest = extremes
    if lowest in old or highest in old:
        return None
    return min([lowest, *new]), max([highest, *new])


def _tickets_of(scores: Float32Array) -> IntArray:
    """Fixed-point weights `[n]` of scores `[n, 1]`: 1024 a unit, at least one, so that every row can be drawn.

    Whole numbers add up to the same sum in any order, so that all ranks agree on it to the last bit.

    >>> _tickets_of(np.array([[2.5], [0.0], [-1.0]], dtype=np.float32)).tolist()
    [2560, 1, 1]
    """
    shares = scores[:, 0] * np.float64(TICKETS_PER_UNIT)
    return np.minimum(np.maximum(shares, 1), MOST_TICKETS).astype(np.int64)


def bounded_scores(scores: Float32Array) -> Float32Array:
    """Scores that can be compared: NaN becomes 0, and infinity the largest score.

    The array itself where they all can be.
    """
    if np.count_nonzero(np.abs(scores) <= LARGEST) == scores.size:
        return scores
    return np.where(np.isnan(scores), np.float32(0), scores.clip(-LARGEST, LARGEST))
